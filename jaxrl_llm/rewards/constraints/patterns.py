"""Regular expressions that users, data or models write.

Python's own engine may take years on a short text ("(a+)+b"), so these run in the `regex` module, which can be given a time: past it the
constraint is a TIMEOUT, which says nothing about the response. Patterns such as that one are refused when the constraint
is read, before any response is.
"""

from __future__ import annotations

import re
import warnings

import regex

from jaxrl_llm.rewards.constraints.kinds import WrongKind
from jaxrl_llm.rewards.constraints.table import Undecidable
from jaxrl_llm.rewards.verdict import Status

LONGEST_PATTERN = 500
# A class or escape is one character; a group of one repeated character, repeated again: (a+)+, ([a-z]*)*, (?:\w+){2,}.
_ONE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]", re.DOTALL)
_NESTED = re.compile(r"\((?:\?:)?[^()|*+?{}][*+]\??\)(?:[*+]|\{\d{0,9},\})")
_COUNT = re.compile(r"\{(\d{0,30})(?:,(\d{0,30}))?\}")
LARGEST = 10_000  # characters of a pattern whose counts are written out: the module's memory grows with them when it compiles
SECONDS = 0.02  # of the processor for one pattern on one response; the `regex` module looks at the clock while it backtracks


def pattern(value) -> str:
    """A kind of parameter: a regular expression."""
    if not isinstance(value, str) or not value:
        raise WrongKind("a regular expression")
    if len(value) > LONGEST_PATTERN:
        raise WrongKind(f"a regular expression of at most {LONGEST_PATTERN} characters")
    if written_out(value) > LARGEST:
        raise WrongKind(f"a regular expression that, with its counts written out, has at most {LARGEST} parts")
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
    """Whether a group that holds nothing but a repetition is itself repeated without bound, which doubles the work with each character."""
    return _NESTED.search(_ONE.sub("c", value)) is not None


def written_out(value: str) -> int:
    """How many characters, classes and escapes a pattern has once its counts are written out: (ab{3}){5} has twenty."""
    spelt, sizes, last, place = _ONE.sub("c", value), [0], 0, 0  # sizes of the open groups; of the part that was just read
    while place < len(spelt):
        char, counted = spelt[place], _COUNT.match(spelt, place)
        place = counted.end() if counted else place + 1
        if counted:
            times = max(int(counted[1] or 0), int(counted[2] or 0), 1)
            sizes[-1] += last * (times - 1)
            last *= times
        elif char == "(":
            sizes.append(0)
        elif char == ")" and len(sizes) > 1:
            last = max(sizes.pop(), 1)
            sizes[-1] += last
        else:
            last = 1
            sizes[-1] += 1
    return sum(sizes)


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
