"""Labels for features from a language model behind an OpenAI-compatible server, and how well each label finds its feature.

A label is made from some of a feature's contexts and judged on others (detection scoring, Paulo et al. 2024): the same server sees the
label and unmarked contexts, in half of which the feature fires, and says which ones fit. The score is the balanced accuracy of that, 0.5
for a label that says nothing. What goes wrong is an error by name, never a score: a server that does not answer ends the run, which goes
on by the same command; an answer that cannot be read leaves that feature without a label, or with one that has no score.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.chat import TRANSIENT, ChatClient, ChatConfig, Fault, Request, Unreadable

HELD_OUT = 3  # every so many-th context of a kind is kept from the one who labels, and judged
MOST_LETTERS = 200  # of a label
HOPELESS = 5  # features in a row without a readable label before the run gives up
EXPLAIN = (
    "You are shown texts in which one feature of a language model's activations fires. The tokens at which it fires are between « and »; the "
    "number before a text is its strongest activation, of at most 100. Say in a few words what the marked tokens, or what comes right before "
    'or after them, have in common. Answer with JSON alone: {"label": "..."}'
)
DETECT = (
    "A feature of a language model is described as given. Of the numbered texts, say which ones contain what is described. None, some or all may. "
    'Answer with JSON alone, the numbers of those texts: {"matches": [...]}'
)


@dataclass(frozen=True)
class LabelConfig:
    """url: of the server's API, such as http://127.0.0.1:8000/v1. model: its name there. key_variable: the environment variable that holds the
    key, if one is needed. timeout: seconds for an answer. retries: further tries when the server fails, after waits from `wait` seconds on
    that double, or when an answer cannot be read. workers: requests at once. max_tokens: of an answer. seed: of what is judged, and its order.
    """

    url: str
    model: str
    key_variable: str = ""
    timeout: float = 60.0
    retries: int = 2
    wait: float = 2.0
    workers: int = 4
    max_tokens: int = 256
    seed: int = 0

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"labels: the url is {self.url!r}; give one such as http://127.0.0.1:8000/v1")
        if not self.model:
            raise UserError("labels: no model: name the one that the server at the url is to use")
        if self.key_variable and not os.environ.get(self.key_variable):
            raise UserError(f"labels: the environment variable {self.key_variable}, which is to hold the server's key, is not set")


def label_features(
    data: Mapping[str, Any],
    config: LabelConfig,
    save: Callable[[dict[str, Any]], None],
    *,
    done: Sequence[int] = (),
    progress: Callable[[Any, int], Any] | None = None,
) -> None:
    """Labels the features of `data` (of `jaxrl_llm.report.features`) that are not in `done`, and saves a record of each as it comes.

    A record has id, and label, score (or None, with "unscored": why), judged (contexts); or "error" instead of a label. Features are
    asked about in the order of the data, `workers` at a time. progress: (iterable, total) -> iterable.

    Raises UserError for a server that does not answer, or refuses: what was saved stays. And where the first HOPELESS answers are none.
    """
    left = [feature for feature in data["features"] if feature["id"] not in set(done)]
    failed = good = 0
    client = chat_client(config)
    ended = threading.Event()  # a server that fails for one feature fails for all: no other is begun

    def one(feature: Mapping[str, Any]) -> dict[str, Any] | None:
        try:
            return None if ended.is_set() else _label(data, feature, config, client)
        except BaseException:
            ended.set()
            raise

    problem: UserError | None = None
    with ThreadPoolExecutor(config.workers) as pool:
        waited = as_completed([pool.submit(one, feature) for feature in left])
        try:
            for future in progress(waited, len(left)) if progress else waited:
                try:
                    record = future.result()
                except UserError as error:
                    problem = problem or error
                    continue  # what is under way is waited for, and saved
                if record is None:
                    continue
                save(record)
                failed, good = failed + ("error" in record), good + ("label" in record)
                if failed >= HOPELESS and not good and not ended.is_set():
                    ended.set()
                    problem = UserError(f"labels: of the first {failed} features none got a readable label: {record.get('error')}; try another model")
        finally:
            ended.set()
    client.close()
    if problem is not None:
        raise problem


def _label(data: Mapping[str, Any], feature: Mapping[str, Any], config: LabelConfig, client: ChatClient) -> dict[str, Any]:
    """The record of one feature."""
    told, held = split_contexts(feature)
    try:
        label = ask(client, _explain_prompt(data, feature, told), read_label)
    except Unreadable as error:
        return {"id": feature["id"], "error": str(error)}
    record: dict[str, Any] = {"id": feature["id"], "label": label, "score": None, "judged": 0}
    rng = np.random.default_rng((config.seed, feature["id"]))
    others = negatives(data, feature)
    number = min(len(held), len(others))
    if number < 2:
        return record | {"unscored": f"{len(held)} held-out and {len(others)} other contexts; 2 of each are needed"}
    chosen = [held[i] for i in sorted(rng.permutation(len(held))[:number])] + [others[i] for i in rng.permutation(len(others))[:number]]
    fires = np.arange(2 * number) < number
    order = rng.permutation(2 * number)
    texts = [_text(data, chosen[i]) for i in order]
    try:
        matches = ask(client, _detect_prompt(label, texts), lambda answer: read_matches(answer, len(texts)))
    except Unreadable as error:
        return record | {"unscored": str(error)}
    said = np.zeros(len(texts), bool)
    said[[m - 1 for m in matches]] = True
    return record | {"score": balanced_accuracy(said, fires[order]), "judged": len(texts)}


def split_contexts(feature: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """(contexts to make a label from, contexts to judge it on) of a feature: no text is in both."""
    told, held = [], []
    for kind in ("top", "sampled"):
        of_kind = [context for context in feature["contexts"] if context["kind"] == kind]
        held += of_kind[HELD_OUT - 1 :: HELD_OUT]
        told += [context for i, context in enumerate(of_kind) if i % HELD_OUT != HELD_OUT - 1]
    texts = {context["text"] for context in told}
    return told, [context for context in held if context["text"] not in texts]


def negatives(data: Mapping[str, Any], feature: Mapping[str, Any]) -> list[Any]:
    """The random contexts in which the feature does not fire."""
    own = {context["text"] for context in feature["contexts"]}
    return [context for context in data.get("random", []) if feature["id"] not in context["fired"] and context["text"] not in own]


def balanced_accuracy(said: np.ndarray, true: np.ndarray) -> float:
    """The mean of the shares of true ones and of false ones that were told right; both kinds must be there."""
    return float((said[true].mean() + (~said[~true]).mean()) / 2)


# ---- what is asked, and what an answer must be ----


def _text(data: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    return "".join(data["vocabulary"][str(token)] for token in context["tokens"])


def _marked(data: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    fires = {place for place, _ in context["fires"]}
    parts = []
    for i, token in enumerate(context["tokens"]):
        text = data["vocabulary"][str(token)]
        opened = "«" if i in fires and i - 1 not in fires else ""
        parts.append(opened + text + ("»" if i in fires and i + 1 not in fires else ""))
    return "".join(parts)


def _explain_prompt(data: Mapping[str, Any], feature: Mapping[str, Any], contexts: list[Any]) -> list[dict[str, str]]:
    def line(context):
        strongest = max((value for _, value in context["fires"]), default=0.0)
        return f"{round(100 * strongest / max(feature['max'], 1e-30))}: {json.dumps(_marked(data, context), ensure_ascii=False)}"

    return [{"role": "system", "content": EXPLAIN}, {"role": "user", "content": "\n".join(map(line, contexts))}]


def _detect_prompt(label: str, texts: list[str]) -> list[dict[str, str]]:
    numbered = "\n".join(f"{i}. {json.dumps(text, ensure_ascii=False)}" for i, text in enumerate(texts, 1))
    return [{"role": "system", "content": DETECT}, {"role": "user", "content": f"Description: {label}\n\n{numbered}"}]


def read_label(answer: str) -> str:
    """The label of {"label": "..."}; raises Unreadable for anything else."""
    found = _json(answer, "label")
    if not isinstance(found, str) or not found.strip() or len(found) > MOST_LETTERS:
        raise Unreadable(f"the label is {found!r:.80}, not a text of 1 to {MOST_LETTERS} letters")
    return " ".join(found.split())


def read_matches(answer: str, most: int) -> list[int]:
    """The numbers of {"matches": [...]}, each of 1 to `most` and named once; raises Unreadable for anything else."""
    found = _json(answer, "matches")
    if not isinstance(found, list) or not all(type(m) is int and 1 <= m <= most for m in found) or len(set(found)) < len(found):
        raise Unreadable(f"the matches are {found!r:.80}, not a list of numbers from 1 to {most}")
    return found


def _json(answer: str, field: str) -> Any:
    text = answer.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text.partition("\n")[2].removesuffix("```")
    try:
        found = json.loads(text)
    except ValueError:
        raise Unreadable(f"the answer is no JSON: {answer!r:.80}") from None
    if not isinstance(found, dict) or set(found) != {field}:
        raise Unreadable(f"the answer is {answer!r:.80}, not an object with {field!r} alone")
    return found[field]


# ---- the server ----


def chat_client(config: LabelConfig) -> ChatClient:
    """The client that asks for labels."""
    again = {"retries": config.retries, "rereads": config.retries, "backoff": config.wait, "timeout": config.timeout}
    return ChatClient(ChatConfig(config.url, config.model, config.key_variable, max_tokens=config.max_tokens, **again))


def ask(client: ChatClient, messages: list[dict[str, str]], read: Callable[[str], Any]) -> Any:
    """What `read` makes of an answer. Raises UserError where the server does not answer, or refuses, Unreadable where no answer can be read."""
    answer, url = client.ask(Request(messages, read=lambda answer: read(answer.text))), client.config.url
    if answer.fault is None:
        return answer.value
    if answer.fault is Fault.REFUSED:
        raise UserError(f"labels: the server at {url} refuses: {answer.reason:.200}; check labels.url, labels.model and the key")
    if answer.fault not in TRANSIENT or answer.fault is Fault.MALFORMED:
        raise Unreadable(answer.reason)
    saved = "the labels so far are saved, and the same command goes on from them"
    raise UserError(f"labels: the server at {url} does not answer ({answer.reason:.200}), after {answer.tries} tries; {saved}")
