"""The one table of constraints: each is declared once, beside its check.

    @constraint("length:lines", "Write exactly {lines} lines.", examples=make, derive=find, lines=positive)
    def _lines(response, lines): return satisfied, "what was found"

name: "group:what". sentence: how a prompt asks for it; a format string over the parameters (with "{range}" or "{times}" for low and
high), or a function of them. examples: a function `(rng) -> (kwargs, a satisfying text, a violating text)`. derive: a function
`(response, rng) -> kwargs or None`, parameters with which the response satisfies it (for back-translation). The check is pure; it raises
Undecidable where no statement about the response can be made.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.rewards.constraints.kinds import Kind, Optional, WrongKind, wanted
from jaxrl_llm.rewards.verdict import Status, Verdict

LONGEST_RESPONSE = 1_000_000  # characters; a longer response is an ERROR, not a long wait
Found = tuple[bool, str]
Example = tuple[dict[str, Any], str, str]


class Undecidable(Exception):
    """A constraint about which nothing can be said here; the message says why."""

    def __init__(self, message: str, status: Status = Status.ERROR):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Constraint:
    """One constraint; see the head of this file."""

    name: str
    sentence: str | Callable[..., str]
    check: Callable[..., Found]
    examples: Callable[[random.Random], Example]
    derive: Callable[[str, random.Random], dict[str, Any] | None] | None
    parameters: dict[str, Kind]

    @property
    def group(self) -> str:
        """The part of the name before the colon."""
        return self.name.split(":")[0]


TABLE: dict[str, Constraint] = {}


def constraint(name: str, sentence: str | Callable[..., str], /, *, examples, derive=None, **parameters: Kind):
    """Decorator: puts a check into the table. Raises ValueError where the name is taken."""

    def add(check: Callable[..., Found]) -> Callable[..., Found]:
        if name in TABLE:
            raise ValueError(f"the constraint {name} is declared twice")
        TABLE[name] = Constraint(name, sentence, check, examples, derive, parameters)
        return check

    return add


def names() -> tuple[str, ...]:
    """The names of all constraints."""
    return tuple(sorted(TABLE))


def validate(name: str, kwargs: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Checks a constraint's name and parameters; returns the parameters as the check takes them.

    A parameter given as None counts as not given: tables hold a column for every constraint's parameters.
    where: put in front of the message, such as a row's id.
    Raises UserError naming the nearest constraint or parameter.
    """
    prefix = f"{where}: " if where else ""
    found = TABLE.get(name) if isinstance(name, str) else None
    if found is None:
        raise UserError(f"{prefix}unknown constraint {name!r}; {nearest(str(name), TABLE)}")
    if not isinstance(kwargs, Mapping):
        raise UserError(f"{prefix}the parameters of constraint {name} must be a mapping, got {kwargs!r}")
    given = {key: value for key, value in kwargs.items() if value is not None}
    for key in given:
        if key not in found.parameters:
            raise UserError(f"{prefix}constraint {name} has no parameter {key!r}; {nearest(str(key), found.parameters)}")
    accepted = {}
    for key, kind in found.parameters.items():
        if key not in given:
            if isinstance(kind, Optional):
                accepted[key] = None
                continue
            raise UserError(f"{prefix}constraint {name} needs the parameter {key!r} ({wanted(kind)})")
        try:
            accepted[key] = kind(given[key])
        except WrongKind as error:
            raise UserError(f"{prefix}parameter {key!r} of constraint {name} is {given[key]!r}; it must be {error}") from None
    _check_bounds(name, accepted, prefix)
    return accepted


def _check_bounds(name: str, accepted: dict[str, Any], prefix: str) -> None:
    low, high = accepted.get("low"), accepted.get("high")
    if low is not None and high is not None and low > high:
        raise UserError(f"{prefix}constraint {name} wants from low={low} to high={high}: low must not be above high")


def evaluate(name: str, response: str, accepted: Mapping[str, Any]) -> Verdict:
    """Checks one constraint with parameters that `validate` returned."""
    if len(response) > LONGEST_RESPONSE:
        return Verdict(Status.ERROR, reason=f"{name}: the response has {len(response)} characters, more than {LONGEST_RESPONSE}")
    try:
        satisfied, reason = TABLE[name].check(response, **accepted)
    except Undecidable as error:
        return Verdict(error.status, reason=f"{name}: {error}")
    return Verdict(Status.PASS if satisfied else Status.FAIL, reason=f"{name}: {reason}")


def check(name: str, response: str, /, **kwargs: Any) -> Verdict:
    """Checks one constraint on one response, as it stands.

    Returns PASS or FAIL; NOT_APPLICABLE where a condition is not met; TIMEOUT where a regular expression was given up; ERROR where
    nothing can be said. Raises UserError for an unknown constraint, and for a missing, unknown or ill-typed parameter.
    """
    return evaluate(name, response, validate(name, kwargs))


def describe(name: str, /, **kwargs: Any) -> str:
    """The sentence that asks for a constraint. Raises UserError as `validate` does."""
    return say(name, validate(name, kwargs))


def say(name: str, accepted: Mapping[str, Any]) -> str:
    """`describe` with parameters that `validate` returned."""
    sentence = TABLE[name].sentence
    if callable(sentence):
        return sentence(**accepted)
    said: dict[str, Any] = {key: listed(value) if isinstance(value, list) else value for key, value in accepted.items()}
    if "low" in said and "high" in said:
        said |= {"range": in_words(said["low"], said["high"]), "times": in_times(said["low"], said["high"])}
    return sentence.format(**said)


def in_words(low: float, high: float) -> str:
    """A range as people say it: "exactly 3", "3 to 5"."""
    return f"exactly {low}" if low == high else f"{low} to {high}"


def in_times(low: float, high: float) -> str:
    """How often, from low to high: "exactly once", "exactly 3 times", "1 to 3 times"."""
    return "exactly once" if low == high == 1 else f"{in_words(low, high)} times"


def example(name: str, rng: random.Random) -> Example:
    """Parameters of a constraint, a text that satisfies it with them and one that violates it; the same for the same state of `rng`."""
    if name not in TABLE:
        raise UserError(f"unknown constraint {name!r}; {nearest(name, TABLE)}")
    return TABLE[name].examples(rng)


def listed(values: list) -> str:
    """Values as people list them: "a", "b" and "c"."""
    quoted = [f'"{value}"' for value in values]
    return quoted[0] if len(quoted) == 1 else ", ".join(quoted[:-1]) + " and " + quoted[-1]


def compare(found: int, limit: int, how: str, what: str) -> Found:
    """Whether a count is "at least" or "less than" a number."""
    return (found >= limit if how == "at least" else found < limit), f"{found} {what}, wanted {how} {limit}"


def exactly(found: int, number: int, what: str) -> Found:
    """Whether a count is a number."""
    return found == number, f"{found} {what}, wanted exactly {number}"


def between(found: float, low: float, high: float, what: str) -> Found:
    """Whether a number lies from low to high, both included."""
    return low <= found <= high, f"{found} {what}, wanted from {low} to {high}"
