"""What a body of the OpenAI API may ask, and what an answer looks like. A field that is not understood is refused, not passed over in silence."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxrl_llm.errors import nearest

MOST_TOP = 20
MOST_N = 128
MOST_STOPS = 16
COMMON = {"model", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream", "stream_options", "logprobs"}
FIELDS = {
    "completions": COMMON | {"prompt", "echo"},
    "chat": COMMON | {"messages", "max_completion_tokens", "top_logprobs"},
}
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}  # ask nothing of the text
# Understood only where they ask for nothing.
NEUTRAL = {
    "presence_penalty": (0, None), "frequency_penalty": (0, None), "logit_bias": ({}, None), "best_of": (1, None), "suffix": ("", None),
    "response_format": ({"type": "text"}, None), "tools": ([], None), "tool_choice": ("none", "auto", None),
    "parallel_tool_calls": (True, False, None),
}  # fmt: skip


class BadRequest(Exception):
    """A request that is not served: an HTTP status, what is wrong, and the field that is."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error as the API spells it."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Job:
    """A request that was understood. prompts: token ids. top: log-probabilities a token, None for none at all."""

    kind: str
    prompts: list[list[int]]
    texts: list[str]
    n: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stops: list[str]
    stream: bool
    with_usage: bool
    top: int | None
    echo: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))


def read_job(kind: str, body: Any, tokenizer: Any, names: Sequence[str], prompt_tokens: int, new_tokens: int) -> Job:
    """The job of a body; kind is "completions" or "chat". names: of the model. prompt_tokens, new_tokens: the most there is room for.

    Raises BadRequest.
    """
    if not isinstance(body, dict):
        raise BadRequest("the body is no JSON object")
    _check_fields(kind, body)
    if body.get("model") not in (None, *names):
        raise BadRequest(f"the model {body['model']!r:.100} is not here: this is {names[0]!r}", "model", 404, "model_not_found")
    default = 16 if kind == "completions" else new_tokens
    asked = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    max_tokens = _number(body, asked, default, 1, new_tokens, whole=True)
    top = _number(body, "logprobs", -1, 0, MOST_TOP, whole=True) if kind == "completions" else -1
    if kind == "chat" and _flag(body, "logprobs"):
        top = _number(body, "top_logprobs", 0, 0, MOST_TOP, whole=True)
    elif body.get("top_logprobs"):
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    prompts, texts = _chat(body, tokenizer) if kind == "chat" else _prompts(body, tokenizer)
    for prompt in prompts:
        if not 1 <= len(prompt) <= prompt_tokens:
            raise BadRequest(f"the prompt has {len(prompt)} tokens; it may have 1 to {prompt_tokens}", None, 400, "context_length_exceeded")
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadRequest("stream_options is no object", "stream_options")
    echo = _flag(body, "echo")
    if echo and top >= 0:
        raise BadRequest("echo together with logprobs is not served: the prompt's log-probabilities are not computed", "echo")
    return Job(
        kind, prompts, texts, n=_number(body, "n", 1, 1, MOST_N, whole=True), max_tokens=max_tokens,
        temperature=_number(body, "temperature", 1.0, 0, 100), top_p=_number(body, "top_p", 1.0, 1e-9, 1),
        top_k=max(_number(body, "top_k", 0, -1, 2**31 - 1, whole=True), 0),
        seed=_number(body, "seed", secrets.randbelow(2**31), -(2**63), 2**63, whole=True) % 2**31, stops=_stops(body),
        stream=_flag(body, "stream"), with_usage=bool(options.get("include_usage")), top=None if top < 0 else top, echo=echo,
    )  # fmt: skip


def _check_fields(kind: str, body: Mapping[str, Any]) -> None:
    known = FIELDS[kind] | HARMLESS
    for name, value in body.items():
        if name in NEUTRAL:
            if not any((value == neutral and type(value) is not bool) or value is neutral for neutral in NEUTRAL[name]):
                raise BadRequest(f"{name} is not served here, only {NEUTRAL[name][0]!r}: leave it out", name)
        elif name not in known:
            raise BadRequest(f"unknown field {name!r:.80}: {nearest(name[:80], known)}", name[:80])


def _number(body: Mapping[str, Any], name: str, default: Any, least: float, most: float, whole: bool = False) -> Any:
    value = body.get(name)
    if value is None:
        return default
    right = type(value) is int or (not whole and type(value) is float and math.isfinite(value))
    if not right or not least <= value <= most:
        raise BadRequest(f"{name} is {value!r:.60}: give a {'whole ' if whole else ''}number from {least:g} to {most:g}", name)
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False) or type(value) is int:
        raise BadRequest(f"{name} is {value!r:.60}: give true or false", name)
    return bool(value)


def _stops(body: Mapping[str, Any]) -> list[str]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and 0 < len(s) <= 1000 for s in stops):
        raise BadRequest(f"stop is {value!r:.60}: give a text, or a list of at most {MOST_STOPS}, none of them empty", "stop")
    return stops


def _prompts(body: Mapping[str, Any], tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    prompt = body.get("prompt")
    of_ids = lambda p: isinstance(p, list) and bool(p) and all(type(t) is int and 0 <= t < len(tokenizer) for t in p)  # noqa: E731
    several = [prompt] if isinstance(prompt, str) or of_ids(prompt) else prompt
    if not isinstance(several, list) or not 1 <= len(several) <= MOST_N or not all(isinstance(p, str) or of_ids(p) for p in several):
        told = f"give a text, a list of 1 to {MOST_N} texts, or ids below {len(tokenizer)} in their place"
        raise BadRequest(f"prompt is {prompt!r:.60}: {told}", "prompt")
    tokens = [_encode(tokenizer, p, True) if isinstance(p, str) else p for p in several]
    return tokens, [p if isinstance(p, str) else tokenizer.decode(p, skip_special_tokens=True) for p in several]


def _chat(body: Mapping[str, Any], tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages):
        raise BadRequest("messages is no list of objects with role and content", "messages")
    if not getattr(tokenizer, "chat_template", None):
        raise BadRequest("this model's tokenizer has no chat template: ask /v1/completions instead", "messages", 400, "no_chat_template")
    chat = [{"role": m["role"], "content": _content(m.get("content"))} for m in messages]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template refuses roles or orders by raising
        raise BadRequest(f"the chat template refuses these messages: {error!s:.200}", "messages") from error
    return [_encode(tokenizer, text, False)], [text]


def _content(content: Any) -> str:
    parts = [content] if isinstance(content, str) else content
    if isinstance(parts, list):
        of = lambda part: part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None  # noqa: E731
        texts = [part if isinstance(part, str) else of(part) for part in parts]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise BadRequest(f"a message's content is {content!r:.60}: give a text, or a list of parts of type text", "messages")


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    try:
        return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    except (UnicodeError, TypeError) as error:  # half a surrogate pair
        raise BadRequest(f"a text cannot be tokenised: {error}") from error


# ---- answers ----


def logprobs_of(kind: str, tokens: Sequence[int], logps: Sequence[float], tops: Any, top: int, spell: Any, start: int = 0) -> dict[str, Any]:
    """The log-probabilities of a choice. tops: (ids [n, K], log-probabilities [n, K]) or None. start: the offset of its text."""
    texts = [spell(token) for token in tokens]
    finite = lambda x: max(float(x), -9999.0)  # JSON has no infinity  # noqa: E731
    likeliest = [
        [(spell(int(i)), finite(p)) for i, p in zip(tops[0][row][:top], tops[1][row][:top], strict=True)] if top else [] for row in range(len(tokens))
    ]
    if kind == "chat":
        entry = lambda text, logp: {"token": text, "logprob": finite(logp), "bytes": list(text.encode("utf-8", "replace"))}  # noqa: E731
        rows = zip(texts, logps, likeliest, strict=True)
        return {"content": [entry(text, logp) | {"top_logprobs": [entry(*other) for other in others]} for text, logp, others in rows]}
    offsets = [start + sum(map(len, texts[:i])) for i in range(len(texts))]
    found = [dict(reversed(others)) for others in likeliest] if top else None  # of tokens spelt alike the likeliest stays
    return {"tokens": texts, "token_logprobs": list(map(finite, logps)), "top_logprobs": found, "text_offset": offsets}


def choice_of(kind: str, index: int, text: str, finish: str | None, logprobs: Any, delta: bool = False, role: bool = False) -> dict[str, Any]:
    """A choice of an answer, or of a chunk of one (delta)."""
    choice: dict[str, Any] = {"index": index, "finish_reason": finish, "logprobs": logprobs}
    if kind == "completions":
        return choice | {"text": text}
    said = ({"role": "assistant"} if role or not delta else {}) | ({"content": text} if text or not delta or role else {})
    return choice | {"delta" if delta else "message": said}


def answer_of(job: Job, model: str, created: int, choices: list[dict[str, Any]], usage: Any, delta: bool = False) -> dict[str, Any]:
    """The body of an answer, or of a chunk of one."""
    prefix, kind = ("chatcmpl", "chat.completion") if job.kind == "chat" else ("cmpl", "text_completion")
    name = f"{kind}.chunk" if delta and job.kind == "chat" else kind
    found = {"id": f"{prefix}-{job.id}", "object": name, "created": created, "model": model, "choices": choices}
    return found if usage is None else found | {"usage": usage}


def usage_of(prompt: int, written: int) -> dict[str, int]:
    """Tokens, as the API counts them."""
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
