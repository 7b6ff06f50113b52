"""What a reward says about one response, and how verdicts become numbers for RL.

A reward is any callable `reward(inputs: list[RewardInput]) -> list[Verdict]`. It answers every input with exactly one Verdict, in order.
Only PASS and FAIL are statements about the response; the others say that no statement could be made, so they carry no score
and are masked from the loss and counted, never turned into a number.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError


class RewardStopped(UserError):
    """A reward cannot go on, and the run is to stop: unlike other exceptions of a reward, no verdict is made of it."""


class Status(enum.StrEnum):
    """The outcome of checking one response."""

    PASS = "pass"
    FAIL = "fail"
    ERROR = "error"  # the checker or the reference answer is at fault
    TIMEOUT = "timeout"  # the check was given up: time or memory ran out
    NOT_APPLICABLE = "not_applicable"  # the check says nothing about this input
    INFRASTRUCTURE = "infrastructure"  # a judge was away, late, cut off, rate-limited, or said nothing that can be read


SCORED = frozenset({Status.PASS, Status.FAIL})


@dataclass(frozen=True)
class Verdict:
    """One response's outcome.

    status: see Status.
    score: a finite number where the check grades finer than pass or fail; None means 1.0 for PASS and 0.0 for FAIL.
    reason: one line for people: why this outcome.
    Raises ValueError for a score on a status that makes no statement, or a score that is not finite.
    """

    status: Status
    score: float | None = None
    reason: str = ""

    def __post_init__(self):
        object.__setattr__(self, "status", Status(self.status))
        if self.score is None:
            return
        if self.status not in SCORED:
            raise ValueError(f"a {self.status} verdict carries no score, got {self.score}")
        if not math.isfinite(self.score):
            raise ValueError(f"the score of a verdict is a finite number, got {self.score}")

    @property
    def value(self) -> float | None:
        """The number for RL: the score, or 1.0 for PASS and 0.0 for FAIL; None where the status makes no statement."""
        if self.status not in SCORED:
            return None
        return float(self.status is Status.PASS) if self.score is None else float(self.score)


@dataclass(frozen=True)
class RewardInput:
    """One response to be judged: the prompt, the response text, the reference answer if there is one, and the whole data row."""

    prompt: str
    response: str
    answer: str | None = None
    row: dict[str, Any] = field(default_factory=dict)


Reward = Callable[[list[RewardInput]], list[Verdict]]


def reward_values(verdicts: Sequence[Verdict]) -> tuple[np.ndarray, np.ndarray]:
    """Turns N verdicts into (values [N] float32, valid [N] bool). Where valid is False the value is 0 and must be masked."""
    values = np.array([0.0 if v.value is None else v.value for v in verdicts], dtype=np.float32)
    valid = np.array([v.value is not None for v in verdicts], dtype=bool)
    return values, valid
