"""Constraints made of others: all, any, not, if-then(-else), and on a part of the response.

A part of them is {"name": ..., "kwargs": {...}}, as in a row. Three-valued: what cannot be decided stays undecided unless the others settle it;
a condition that is not met makes the whole NOT_APPLICABLE, which is neither kept nor broken.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.constraints import samples
from jaxrl_llm.rewards.constraints.keywords import nth, ordinal
from jaxrl_llm.rewards.constraints.kinds import Optional, WrongKind, place, text
from jaxrl_llm.rewards.constraints.lengths import lines, paragraphs
from jaxrl_llm.rewards.constraints.markdown import split_code
from jaxrl_llm.rewards.constraints.structured import tagged
from jaxrl_llm.rewards.constraints.table import Found, Undecidable, constraint, evaluate, say, validate
from jaxrl_llm.rewards.text_measures import sentences
from jaxrl_llm.rewards.verdict import Status, Verdict

DEEPEST, MOST = 6, 30
Part = tuple[str, dict[str, Any]]


def part(value: Any, depth: int = 0) -> Part:
    """A kind of parameter: one constraint."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    if isinstance(value, tuple) and len(value) == 2:  # as this kind returned it
        value = {"name": value[0], "kwargs": value[1]}
    if not isinstance(value, Mapping) or "name" not in value or set(value) - {"name", "kwargs"}:
        raise WrongKind('a constraint, {"name": ..., "kwargs": {...}}')
    if _depth(value) > DEEPEST:
        raise WrongKind(f"a constraint nested at most {DEEPEST} deep")
    try:
        return value["name"], validate(value["name"], value.get("kwargs") or {})
    except UserError as error:
        raise WrongKind(f"a constraint that is valid: {error}") from None


def parts(value: Any) -> list[Part]:
    """A kind of parameter: a list of constraints."""
    found = list(value) if isinstance(value, (list, tuple)) or hasattr(value, "tolist") else []
    if not 1 <= len(found) <= MOST:
        raise WrongKind(f'a list of 1 to {MOST} constraints, {{"name": ..., "kwargs": {{...}}}}')
    return [part(entry) for entry in found]


def _depth(value: Any) -> int:
    """How deep mappings and lists are nested, looked at without recursion."""
    deepest, pending = 0, [(value, 0)]
    while pending and deepest <= DEEPEST * 3:
        entry, depth = pending.pop()
        if isinstance(entry, Mapping) and "name" in entry:
            deepest, depth = max(deepest, depth + 1), depth + 1
        if isinstance(entry, Mapping):
            pending += [(inner, depth) for inner in entry.values()]
        elif isinstance(entry, (list, tuple)):
            pending += [(inner, depth) for inner in entry]
    return deepest


def sentence(found: Part) -> str:
    """How a prompt asks for a part of a composition."""
    return say(*found)


def _judged(response: str, found: list[Part]) -> list[Verdict]:
    verdicts = [evaluate(name, response, accepted) for name, accepted in found]
    return [verdict for verdict in verdicts if verdict.status is not Status.NOT_APPLICABLE]


def _settle(verdicts: list[Verdict], settles: Status, otherwise: bool) -> Found:
    """One verdict of status `settles` decides; else an undecided one leaves it open; else it is `otherwise`."""
    if not verdicts:
        raise Undecidable("no condition is met", Status.NOT_APPLICABLE)
    decided = next((verdict for verdict in verdicts if verdict.status is settles), None)
    if decided is not None:
        return settles is Status.PASS, decided.reason
    _raise_undecided(verdicts)
    return otherwise, "; ".join(verdict.reason for verdict in verdicts)


def _raise_undecided(verdicts: list[Verdict]) -> None:
    for verdict in verdicts:
        if verdict.value is None:
            raise Undecidable(verdict.reason, verdict.status)


def _has(word: str) -> dict:
    return {"name": "keywords:words", "kwargs": {"words": [word]}}


def _all_examples(rng: random.Random):
    one, two = samples.nouns(rng, 2)
    both = [_has(one), {"name": "punctuation:no_comma", "kwargs": {}}]
    return {"parts": both}, f"A {one} and a {two}.", rng.choice((f"A {two}.", f"A {one}, a {two}."))


@constraint("logic:all", lambda parts: " ".join(map(sentence, parts)), examples=_all_examples, parts=parts)
def _all(response: str, parts: list[Part]) -> Found:
    return _settle(_judged(response, parts), Status.FAIL, True)


def _any_examples(rng: random.Random):
    one, two, three = samples.nouns(rng, 3)
    return {"parts": [_has(one), _has(two)]}, f"A {two}.", f"A {three}."


@constraint(
    "logic:any", lambda parts: "Do at least one of these: " + " Or: ".join(map(sentence, parts)), examples=_any_examples, parts=parts,
)  # fmt: skip
def _any(response: str, parts: list[Part]) -> Found:
    return _settle(_judged(response, parts), Status.PASS, False)


def _not_examples(rng: random.Random):
    one, two = samples.nouns(rng, 2)
    return {"part": _has(one)}, f"A {two}.", f"A {one}."


@constraint("logic:not", lambda part: "Do not do this: " + sentence(part), examples=_not_examples, part=part)
def _not(response: str, part: Part) -> Found:
    verdict = evaluate(*_place(part, response))
    _raise_undecided([verdict])
    return verdict.status is Status.FAIL, f"not ({verdict.reason})"


def _place(found: Part, response: str) -> tuple[str, str, dict[str, Any]]:
    return found[0], response, found[1]


def _if_examples(rng: random.Random):
    one, two, three = samples.nouns(rng, 3)
    given = {"condition": _has(one), "then": _has(two)}
    if rng.random() < 0.5:
        return given, f"A {one} and a {two}.", f"A {one} and a {three}."
    return {**given, "otherwise": _has(three)}, f"A {three}.", f"A {two}."


def _if_sentence(condition: Part, then: Part, otherwise: Part | None) -> str:
    said = f"If your answer does this: {sentence(condition)} Then also: {sentence(then)}"
    return said if otherwise is None else f"{said} Otherwise: {sentence(otherwise)}"


@constraint("logic:if", _if_sentence, examples=_if_examples, condition=part, then=part, otherwise=Optional(part))
def _if(response: str, condition: Part, then: Part, otherwise: Part | None = None) -> Found:
    verdict = evaluate(*_place(condition, response))
    _raise_undecided([verdict])
    branch = then if verdict.status is Status.PASS else otherwise
    if branch is None:
        raise Undecidable(f"the condition is not met ({verdict.reason})", Status.NOT_APPLICABLE)
    found = evaluate(*_place(branch, response))
    _raise_undecided([found])
    return found.status is Status.PASS, found.reason


# ---- on a part of the response

SPANS = ("sentence", "paragraph", "line", "code block", "tag")


def span(value: Any) -> dict[str, Any]:
    """A kind of parameter: {"kind": one of SPANS, "place": 1 or -1 ..., "tag": name}, or {"after": text} or {"before": text}."""
    wanted = f'a part of the response: {{"kind": one of {", ".join(SPANS)}, "place": 1}}, {{"after": text}} or {{"before": text}}'
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            value = None
    value = {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, Mapping) else {}
    if set(value) in ({"after"}, {"before"}):
        return {key: text(entry) for key, entry in value.items()}
    allowed = {"kind", "place"} | ({"tag"} if value.get("kind") == "tag" else set())
    if value.get("kind") not in SPANS or set(value) - allowed or (value["kind"] == "tag" and "tag" not in value):
        raise WrongKind(wanted)
    return {**value, "place": place(value.get("place", 1)), **({"tag": text(value["tag"])} if "tag" in value else {})}


def cut(response: str, span: dict[str, Any]) -> str | None:
    """The part of a response that a span names, None where there is none."""
    if "after" in span or "before" in span:
        mark = span.get("after") or span["before"]
        before, found, after = response.partition(mark)
        return None if not found else after if "after" in span else before
    kind = span["kind"]
    if kind == "tag":
        return nth(tagged(response, span["tag"]), span["place"])
    if kind == "code block":
        return nth([block.text for block in split_code(response)[1]], span["place"])
    return nth({"sentence": sentences, "paragraph": paragraphs, "line": lines}[kind](response), span["place"])


def _span_name(span: dict[str, Any]) -> str:
    if "after" in span or "before" in span:
        side = "after" if "after" in span else "before"
        return f'the text {side} "{span[side]}"'
    return f"the {ordinal(span['place'])} " + (f"<{span['tag']}> part" if span["kind"] == "tag" else span["kind"])


def _on_examples(rng: random.Random):
    one, two = samples.nouns(rng, 2)
    wanted = {"span": {"kind": "paragraph", "place": 2}, "part": _has(one)}
    return wanted, f"A {two}.\n\nA {one}.", rng.choice((f"A {one}.\n\nA {two}.", f"A {one}."))


@constraint(
    "logic:on", lambda span, part: f"For {_span_name(span)} of your answer: {sentence(part)}", examples=_on_examples, span=span, part=part,
)  # fmt: skip
def _on(response: str, span: dict[str, Any], part: Part) -> Found:
    found = cut(response, span)
    if found is None:
        return False, f"there is no {_span_name(span).removeprefix('the ')}"
    verdict = evaluate(*_place(part, found))
    _raise_undecided([verdict])
    return verdict.status is Status.PASS, f"{_span_name(span)}: {verdict.reason}"
