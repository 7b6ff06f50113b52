"""Regular expressions that users, data or models write.

Python's own engine may take years on a short text ("(a+)+b"), so these run in the `regex` module, which can be given a time: past it the
constraint is a TIMEOUT, which says nothing about the response. Patterns that repeat a repetition without bound are refused when the
constraint is read, before any response is.
"""

from __future__ import annotations

import warnings

import regex

from jaxrl_llm.rewards.constraints.kinds import WrongKind
from jaxrl_llm.rewards.constraints.table import Undecidable
from jaxrl_llm.rewards.verdict import Status

LONGEST_PATTERN = 500
SECONDS = 0.04  # for one pattern on one response; the `regex` module looks at the clock while it backtracks


def pattern(value) -> str:
    """A kind of parameter: a regular expression."""
    if not isinstance(value, str) or not value:
        raise WrongKind("a regular expression")
    if len(value) > LONGEST_PATTERN:
        raise WrongKind(f"a regular expression of at most {LONGEST_PATTERN} characters")
    try:
        compiled(value)
    except (regex.error, OverflowError, RecursionError, ValueError) as error:
        raise WrongKind(f"a regular expression ({error})") from None
    if nested_repetition(value):
        raise WrongKind("a regular expression that repeats no repetition without bound, such as (a+)+: write a+ alone")
    return value


def compiled(value: str) -> regex.Pattern:
    """The pattern, compiled; the module keeps the newest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about Python's future syntax are no business of a verdict
        return regex.compile(value, regex.VERSION0 | regex.MULTILINE)


def nested_repetition(value: str) -> bool:
    """Whether a group that holds an unbounded repetition is itself repeated without bound."""
    groups, closed, place = [False], False, 0  # whether each open group holds a repetition; whether the group that just closed does
    while place < len(value):
        char = value[place]
        if char == "\\":
            place, closed = place + 2, False
            continue
        if char == "[":
            place, closed = _end_of_class(value, place), False
            continue
        unbounded = char in "*+" or (char == "{" and regex.match(r"\{\d*,\}", value[place:]) is not None)
        if unbounded and closed:
            return True
        if unbounded:
            groups[-1] = True
        if char == "(":
            groups.append(False)
        closed = char == ")" and len(groups) > 1 and groups.pop()
        if char == ")":
            groups[-1] = groups[-1] or closed
        place += 1
    return False


def _end_of_class(value: str, start: int) -> int:
    place = start + 1
    if value[place : place + 1] == "^":
        place += 1
    if value[place : place + 1] == "]":
        place += 1
    while place < len(value) and value[place] != "]":
        place += 2 if value[place] == "\\" else 1
    return place + 1


def count_matches(value: str, text: str, most: int = 10_000) -> int:
    """How many times a pattern is found in a text, up to `most`. Raises Undecidable (TIMEOUT) past SECONDS."""
    return _timed(value, lambda found: sum(1 for _, _ in zip(range(most), found.finditer(text, timeout=SECONDS), strict=False)))


def matches_whole(value: str, text: str) -> bool:
    """Whether a pattern matches a text from its start to its end. Raises Undecidable (TIMEOUT) past SECONDS."""
    return _timed(value, lambda found: found.fullmatch(text, timeout=SECONDS) is not None)


def _timed(value: str, ask):
    try:
        return ask(compiled(value))
    except TimeoutError:
        raise Undecidable(f"the pattern {value!r} was given up after {SECONDS} s", Status.TIMEOUT) from None
    except (MemoryError, RecursionError) as error:
        raise Undecidable(f"the pattern {value!r} cannot be run here ({type(error).__name__})") from None
