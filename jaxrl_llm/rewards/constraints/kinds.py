"""Kinds of parameters: each takes a value as data holds it and returns it as a rule wants it, or raises WrongKind saying what is wanted.

Values come from JSON and from parquet tables, so 3.0 is the whole number 3 and a numpy array is a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

RELATIONS = ("at least", "less than")
LONGEST_LIST = 1000
MOST = 1e300
Kind = Callable[[Any], Any]


class WrongKind(Exception):
    """A parameter's value that is of another kind; the message says what it must be."""


def count(value: Any) -> int:
    """A whole number from 0 up."""
    return _whole(value, 0, "a whole number from 0 up")


def positive(value: Any) -> int:
    """A whole number from 1 up."""
    return _whole(value, 1, "a whole number from 1 up")


def place(value: Any) -> int:
    """A place counted from 1, or from the end: -1 is the last."""
    found = _whole(value, -math.inf, "a whole number: 1 is the first, -1 the last")
    if found == 0:
        raise WrongKind("a whole number: 1 is the first, -1 the last")
    return found


def _is_number(value: Any) -> bool:
    """Whether a value is an int or a finite float, of Python or of numpy, not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and (isinstance(value, Integral) or math.isfinite(value))


def _whole(value: Any, least: float, wanted: str) -> int:
    if not _is_number(value) or value != int(value) or value < least:
        raise WrongKind(wanted)
    return int(value)


def number(value: Any) -> float:
    """A finite number."""
    if not _is_number(value) or abs(value) > MOST:
        raise WrongKind("a finite number")
    return float(value)


def share(value: Any) -> float:
    """A number from 0 to 1."""
    if not _is_number(value) or not 0 <= value <= 1:
        raise WrongKind("a number from 0 to 1")
    return float(value)


def text(value: Any) -> str:
    """A string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise WrongKind("a string that is not blank")
    return value


def letter(value: Any) -> str:
    """One character."""
    if not isinstance(value, str) or len(value.strip()) != 1:
        raise WrongKind("one character")
    return value


def word(value: Any) -> str:
    """A string without white space."""
    if not isinstance(value, str) or not value or value.split() != [value]:
        raise WrongKind("one word, without white space")
    return value


def texts(value: Any) -> list[str]:
    """A list of strings, none blank, at least one."""
    found = list(value) if isinstance(value, (list, tuple)) or hasattr(value, "tolist") else []
    if not 1 <= len(found) <= LONGEST_LIST or not all(isinstance(entry, str) and entry.strip() for entry in found):
        raise WrongKind("a list of strings")
    return found


def choice(*options: str) -> Kind:
    """One of the strings given."""

    def kind(value: Any) -> str:
        if not isinstance(value, str) or value not in options:
            raise WrongKind(f"one of {', '.join(options)}")
        return value

    return kind


relation = choice(*RELATIONS)


class Optional:
    """A parameter that may be left out: then it is None."""

    def __init__(self, kind: Kind):
        self.kind = kind

    def __call__(self, value: Any) -> Any:
        """The value as the kind behind this one takes it."""
        return self.kind(value)


def wanted(kind: Kind) -> str:
    """What a kind asks for, in words."""
    try:
        kind(object())
    except WrongKind as error:
        return str(error)
    return "any value"
