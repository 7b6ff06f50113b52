"""The client of any OpenAI-compatible chat server: every request gets one answer, in order, and what went wrong has a name.

Requests are asked by a few threads, each answer by its own deadline and all by the batch's. A connection that fails, a server's error, 429 and
408 are tried again after a wait that doubles and is drawn (so that clients do not come back all at once), or that the server names; other
4xx are not. Whole answers go to a cache on disk, so that a run that was stopped asks nothing twice. The key comes from the environment
and goes nowhere but into the request's header.
"""

from __future__ import annotations

import email.utils
import enum
import http.client
import json
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.chat_budget import Budget, BudgetConfig
from jaxrl_llm.rewards.chat_cache import AnswerCache, request_key
from jaxrl_llm.rewards.chat_wire import Wire
from jaxrl_llm.rewards.verdict import RewardStopped

AGAIN = frozenset({408, 409, 425, 429})  # beside 5xx
SETTLED = frozenset({401, 403, 404})  # the key, the address or the model is wrong: so it is for every other request
WHOLE = (None, "stop", "eos")  # finish reasons of a whole answer


class Fault(enum.StrEnum):
    """Why a request has no answer."""

    CONNECTION = "connection"  # refused, reset, or an answer cut off
    TIMEOUT = "timeout"  # of the call, or of the batch
    RATE_LIMITED = "rate_limited"  # 429
    SERVER = "server"  # 5xx
    REFUSED = "refused"  # another status than 200
    MALFORMED = "malformed"  # no chat completion, or one without a choice or a text
    TRUNCATED = "truncated"  # finish reason "length"
    UNREADABLE = "unreadable"  # a text that `read` cannot read


TRANSIENT = frozenset({Fault.CONNECTION, Fault.TIMEOUT, Fault.RATE_LIMITED, Fault.SERVER, Fault.MALFORMED})


class Unreadable(ValueError):
    """What a model said is not of the form that was asked for."""


@dataclass(frozen=True)
class ChatConfig:
    """url: of the API, such as http://127.0.0.1:8000/v1. model: its name there. key_variable: environment variable of the key, if one is needed.
    timeout: seconds for one answer. deadline: seconds for a batch. workers: requests at once. retries: further tries after a fault that may
    pass, the n-th (from 0) after half to whole of `backoff * 2**n` seconds, at most `most_wait`. rereads: further tries for an answer that
    cannot be read. max_tokens, temperature: of an answer. cache: SQLite file of answers, "" for none. budget: failures that a run bears.
    price_in, price_out: of a million tokens of prompt and of answer, in whatever money.
    """

    url: str
    model: str
    key_variable: str = ""
    timeout: float = 60.0
    deadline: float = math.inf
    workers: int = 8
    retries: int = 4
    backoff: float = 1.0
    most_wait: float = 60.0
    rereads: int = 1
    max_tokens: int = 1024
    temperature: float = 0.0
    cache: str = ""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    price_in: float = 0.0
    price_out: float = 0.0

    def __post_init__(self):
        if not self.model:
            raise UserError("no model: name the one that the server at the url is to use")
        if self.key_variable and not os.environ.get(self.key_variable, "").strip():
            raise UserError(f"the environment variable {self.key_variable}, which is to hold the server's key, is not set")
        for name, least in (("timeout", 1e-3), ("deadline", 1e-3), ("workers", 1), ("retries", 0), ("backoff", 0), ("rereads", 0), ("max_tokens", 1)):
            if not getattr(self, name) >= least:
                raise UserError(f"the chat client's {name} is {getattr(self, name)}: give {least:g} or more")


@dataclass(frozen=True)
class Request:
    """messages: as the API takes them. parameters: more of the body, over the config's. read: an answer -> its value, or raises
    Unreadable. partial: an answer that ends for its length is whole, as where one token is asked for.
    """

    messages: Sequence[Mapping[str, str]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Answer], Any] | None = None
    partial: bool = False


@dataclass(frozen=True)
class Answer:
    """fault: None, or why there is none. status: the last HTTP status, 0 where none came. value: what the request's `read` made of it.
    top_logprobs: of each token of the answer, the log-probabilities of the likeliest, where they were asked for. tries: requests sent.
    """

    text: str = ""
    fault: Fault | None = None
    reason: str = ""
    status: int = 0
    value: Any = None
    top_logprobs: tuple[dict[str, float], ...] = ()
    cached: bool = False
    tries: int = 0


@dataclass
class Usage:
    """What was asked and spent: requests (repeats within a batch count once), those of the cache, tries sent, tries by fault, tokens, money."""

    requests: int = 0
    cached: int = 0
    tries: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class ChatClient:
    """Asks the server of a ChatConfig; safe for several threads. clock, sleep, rng: a test's own."""

    def __init__(
        self,
        config: ChatConfig,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Any] | None = None,
        rng: random.Random | None = None,
    ):
        self.config, self.usage = config, Usage()
        self.cache = AnswerCache(config.cache) if config.cache else None
        self._wire = Wire(config.url)
        self._clock, self._rng = clock, random.Random() if rng is None else rng
        self._sleep = sleep
        self._lock = threading.Lock()
        self._budget = Budget(config.budget, clock, time.sleep if sleep is None else sleep)

    def close(self) -> None:
        """Closes connections and cache."""
        self._wire.close()
        if self.cache is not None:
            self.cache.close()

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent, and hashed for the cache."""
        c = self.config
        return {"model": c.model, "messages": [dict(m) for m in request.messages], "temperature": c.temperature, "max_tokens": c.max_tokens} | dict(
            request.parameters
        )

    def ask(self, request: Request) -> Answer:
        """The answer to one request, or its fault; raises UserError only for a cache that cannot be used."""
        return self._ask(request, self._clock() + self.config.deadline, threading.Event())

    def ask_all(self, requests: Sequence[Request], progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None) -> list[Answer]:
        """One answer a request, in order. Requests that are the same in all they send and read are sent once.

        progress: (iterable, total) -> iterable.

        Raises RewardStopped where the error budget is spent, or the server says that the key, the address or the model is wrong (401, 403, 404).
        Answers that had come by then are in the cache.
        """
        until, ended = self._clock() + self.config.deadline, threading.Event()
        keys = [(request_key(self.body(r)), r.read, r.partial) for r in requests]
        first = dict(zip(reversed(keys), reversed(requests), strict=True))
        answers: dict[Any, Answer] = {}
        with ThreadPoolExecutor(min(self.config.workers, max(len(first), 1)), thread_name_prefix="jaxrl-llm-chat") as pool:
            futures: dict[Future[Answer], Any] = {pool.submit(self._counted, first[key], until, ended): key for key in dict.fromkeys(keys)}
            try:
                waited = as_completed(futures)
                for future in progress(waited, len(futures)) if progress else waited:
                    answers[futures[future]] = future.result()
            except BaseException:
                ended.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [answers[key] for key in keys]

    def _counted(self, request: Request, until: float, ended: threading.Event) -> Answer:
        """An answer that counts towards the budget of errors."""
        cache = self.config.cache
        kept = f"answers so far are in {cache}, and the same command goes on from them" if cache else "name a cache to keep answers"
        try:
            answer = self._ask(request, until, ended, gate=True)
            if answer.fault is None and not answer.cached:
                self._budget.passed()
            elif answer.fault is not None and not ended.is_set():
                if answer.status in SETTLED:
                    raise RewardStopped(f"refuses: {answer.reason}; check the url, the model's name and the key")
                self._budget.failed(f"{answer.fault}: {answer.reason}", wait_helps=answer.fault in TRANSIENT)
            return answer
        except RewardStopped as error:
            ended.set()
            raise RewardStopped(f"the chat server at {self.config.url}: {error}; {kept}") from None

    def _ask(self, request: Request, until: float, ended: threading.Event, gate: bool = False) -> Answer:
        body = self.body(request)
        key = request_key(body)
        found = self.cache.get(key) if self.cache is not None else None
        with self._lock:
            self.usage.requests += 1
            self.usage.cached += found is not None
        if found is not None:
            return self._read(_of_completion(found, request.partial), request, cached=True)
        if gate:
            self._budget.gate(ended)
        answer = self._tried(request, json.dumps(body).encode(), until, ended)
        if answer.fault is None and self.cache is not None:
            raw = self.cache.put(key, answer.value[1])
            answer = replace(self._read(_of_completion(raw, request.partial), request), tries=answer.tries, status=answer.status)
        elif answer.fault is None:
            answer = replace(answer, value=answer.value[0])
        if answer.fault is not None:
            with self._lock:
                self.usage.failed[str(answer.fault)] += 1
        return answer

    def _tried(self, request: Request, raw: bytes, until: float, ended: threading.Event) -> Answer:
        """The answer after as many tries as it takes and may; the value of a good one is (what was read, what to keep)."""
        c, tries, rereads = self.config, 0, 0
        while True:
            left = until - self._clock()
            if left <= 0 or ended.is_set():
                return Answer(fault=Fault.TIMEOUT, reason=f"no answer within the {c.deadline:g} s of the batch", tries=tries)
            answer, named = self._once(request, raw, min(c.timeout, left))
            tries += 1
            answer = replace(answer, tries=tries, reason=self._hide(answer.reason))
            with self._lock:
                self.usage.tries += 1
                self.usage.faults.update([str(answer.fault)] if answer.fault else [])
            if answer.fault is Fault.UNREADABLE and rereads < c.rereads:
                rereads += 1
                continue
            if answer.fault not in TRANSIENT or tries - rereads > c.retries:
                return answer
            grown = min(c.most_wait, c.backoff * 2.0 ** min(tries - rereads - 1, 60))
            wait = max(grown * self._rng.uniform(0.5, 1.0), min(named, c.most_wait))
            if self._clock() + wait >= until:
                return answer
            (ended.wait if self._sleep is None else self._sleep)(wait)

    def _once(self, request: Request, raw: bytes, seconds: float) -> tuple[Answer, float]:
        """One try, and the seconds that the server asks to be left alone."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.config.key_variable:
            headers["Authorization"] = f"Bearer {self._key()}"
        try:
            status, told, said = self._wire.post("/chat/completions", raw, headers, seconds)
        except TimeoutError:
            return Answer(fault=Fault.TIMEOUT, reason=f"timed out: no answer within {seconds:g} s"), 0.0
        except (OSError, http.client.HTTPException) as error:
            return Answer(fault=Fault.CONNECTION, reason=f"{type(error).__name__}: {error}"), 0.0
        if status != 200:
            reason = f"HTTP {status}: {' '.join(said[:300].decode(errors='replace').split()) or http.client.responses.get(status, '')}"
            fault = Fault.RATE_LIMITED if status == 429 else Fault.SERVER if status >= 500 or status in AGAIN else Fault.REFUSED
            return Answer(fault=fault, reason=reason, status=status), retry_after(told.get("retry-after", ""))
        try:
            # UTF-8 or nothing: a guessed encoding would be another text.
            completion = json.loads(self._hide(said.decode()))
        except ValueError:
            return Answer(fault=Fault.MALFORMED, reason=f"the server's answer is no chat completion: {said[:80]!r}", status=200), 0.0
        self._spend(completion)
        answer = self._read(_of_completion(completion, request.partial), request)
        if answer.fault is None:
            answer = replace(answer, value=(answer.value, _kept(completion)))
        return replace(answer, status=200), 0.0

    def _read(self, answer: Answer, request: Request, cached: bool = False) -> Answer:
        answer = replace(answer, cached=cached)
        if answer.fault is not None or request.read is None:
            return answer
        try:
            return replace(answer, value=request.read(answer))
        except Unreadable as error:
            return replace(answer, fault=Fault.UNREADABLE, reason=str(error))

    def _spend(self, completion: Any) -> None:
        usage = completion.get("usage") if isinstance(completion, dict) else None
        told = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
        read, written = (n if type(n) is int and n >= 0 else 0 for n in told)
        with self._lock:
            self.usage.prompt_tokens += read
            self.usage.completion_tokens += written
            self.usage.cost += (read * self.config.price_in + written * self.config.price_out) / 1e6

    def _key(self) -> str:
        return os.environ.get(self.config.key_variable, "").strip() if self.config.key_variable else ""

    def _hide(self, text: str) -> str:
        """A text without the key, which servers like to repeat."""
        key = self._key()
        return text.replace(key, "***") if key else text


def retry_after(text: str) -> float:
    """The seconds of a Retry-After header: a number, or a date (RFC 9110, 10.2.3); 0 for anything else."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return max(seconds, 0.0) if math.isfinite(seconds) else 0.0


def _of_completion(found: Any, partial: bool) -> Answer:
    """The answer in a chat completion, read strictly."""
    try:
        choice = found["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError):
        return Answer(fault=Fault.MALFORMED, reason=f"the server's answer is no chat completion: {json.dumps(found)[:80]}")
    if finish == "length" and not partial:
        return Answer(fault=Fault.TRUNCATED, reason="the answer was cut off at its length limit: raise max_tokens")
    if finish not in WHOLE and not (finish == "length" and partial):
        return Answer(fault=Fault.UNREADABLE, reason=f"the answer ended for {finish!r:.40}")
    if not isinstance(text, str):
        return Answer(fault=Fault.MALFORMED, reason="the server's answer holds no text")
    try:
        return Answer(text, top_logprobs=_top_logprobs(choice.get("logprobs")))
    except (LookupError, TypeError, ValueError, AttributeError):
        return Answer(fault=Fault.MALFORMED, reason="the log-probabilities of the server's answer cannot be read")


def _top_logprobs(found: Any) -> tuple[dict[str, float], ...]:
    if not found or not found.get("content"):
        return ()
    tokens = []
    for entry in found["content"]:
        table: dict[str, float] = {}
        for top in entry.get("top_logprobs") or []:
            logprob = float(top["logprob"])
            if math.isnan(logprob):
                raise ValueError("a log-probability is no number")
            # Several tokens may be spelt alike once bytes are made text.
            table[top["token"]] = float(max(table.get(top["token"], -math.inf), logprob))
        tokens.append(table)
    return tuple(tokens)


def _kept(completion: Mapping[str, Any]) -> dict[str, Any]:
    """What of a completion goes to the cache."""
    choice = completion["choices"][0]
    kept = {"message": {"content": choice["message"]["content"]}, "finish_reason": choice.get("finish_reason")}
    if choice.get("logprobs"):
        kept["logprobs"] = choice["logprobs"]
    return {"choices": [kept]}
