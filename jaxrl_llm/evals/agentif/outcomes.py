"""What came of a constraint on a response, and what of it counts in which way of making figures.

The published code drops whatever has no score: closed gates, crashed checks, unreadable replies, failed calls, all alike. Here each has its
name, and three ways stand side by side:

published   the published figures exactly: what has no score is dropped
crashed     what the file holds no score for at all, as a crash of the published code leaves it, counts as not satisfied
strict      so does every other error: a check that raised or ran out of time, a reply that is neither YES nor NO, a response that never came

A closed gate counts in none, nor does a constraint that no response can be judged by. INFRASTRUCTURE, a judge that was not reached or did not
answer in form, is no score: those are asked again by the same command. (Where a judge was asked the published way, a reply with YES or NO
somewhere in it has a published score, for that is how the published code reads it.)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.evals.agentif.rows import CODE, NOTHING, Constraint, Row

WAYS = ("published", "crashed", "strict")


class Result(enum.StrEnum):
    """What came of one constraint."""

    PASSED = "passed"
    FAILED = "failed"
    CLOSED = "closed"  # its condition is not met: nothing to satisfy
    BROKEN = "broken"  # no response can be judged by it
    UNSCORED = "unscored"  # a stored file holds no score: the published code crashed in its row
    ERROR = "error"  # the check raised, or returned what is no verdict
    TIMEOUT = "timeout"  # the check ran out of time or memory
    UNREADABLE = "unreadable"  # a stored reply is neither YES nor NO
    UNANSWERED = "unanswered"  # there is no response
    INFRASTRUCTURE = "infrastructure"  # the judge was not reached, or did not answer in form


COUNTED = {  # as not satisfied
    "published": frozenset(),
    "crashed": frozenset({Result.UNSCORED}),
    "strict": frozenset({Result.UNSCORED, Result.ERROR, Result.TIMEOUT, Result.UNREADABLE, Result.UNANSWERED}),
}


@dataclass(frozen=True)
class Outcome:
    """result: by our reading. published: the score by the published one (true, false, or another value that its code lets through; None: none).
    reason: one line. said: the last reply of a judge, where one was asked.
    """

    result: Result
    published: Any = None
    reason: str = ""
    said: str | None = None

    def counts(self, way: str) -> bool | None:
        """Whether the constraint is satisfied, in a way of WAYS; None where it does not count."""
        if way != "strict" and self.published is not None:
            return self.published is True
        if way == "strict" and self.result in (Result.PASSED, Result.FAILED):
            return self.result is Result.PASSED
        return False if self.result in COUNTED[way] else None

    def blocks(self, way: str) -> bool:
        """Whether it keeps its row from being satisfied. The published code lets any true value do there, and `True` alone in CSR."""
        if way != "strict" and self.published is not None:
            return not self.published
        return self.counts(way) is False


def yes_no(text: str) -> bool | None:
    """The published reading of a reply: YES anywhere in it, else NO anywhere, else nothing."""
    return True if "YES" in text else False if "NO" in text else None


def stored_outcome(row: Row, constraint: Constraint) -> Outcome:
    """What a result file says of a constraint. A null behind a gate counts as a closed gate, though it may hide an error: the file does not tell
    them apart."""
    score, said = constraint.score, constraint.llm_output
    if row.output is None and not row.scored:  # of a row with scores the output has been taken out
        return Outcome(Result.UNANSWERED, reason="the file holds no output")
    if score is NOTHING:
        return Outcome(Result.UNSCORED, reason="the file holds no score")
    if isinstance(score, bool):
        return Outcome(Result.PASSED if score else Result.FAILED, score, "stored", said)
    if score is not None:
        return Outcome(Result.ERROR, score, f"the stored score is a {type(score).__name__}", said)
    if constraint.broken:
        return Outcome(Result.BROKEN, reason=constraint.broken)
    if said is not None:
        return Outcome(Result.UNREADABLE, reason=f"the stored reply is {said[:60]!r}", said=said)
    if constraint.gated:
        return Outcome(Result.CLOSED, reason="null behind a condition")
    return Outcome(Result.ERROR, reason="its code gave nothing" if constraint.steps[-1].kind == CODE else "its judge gave nothing")


def absent_outcome(constraint: Constraint) -> Outcome:
    """Of a row that a result file leaves out. Behind a gate nobody knows whether there was anything to satisfy."""
    if constraint.broken:
        return Outcome(Result.BROKEN, reason=constraint.broken)
    if constraint.gated:
        return Outcome(Result.CLOSED, reason="no response, behind a condition")
    return Outcome(Result.UNANSWERED, reason="the file holds no such row")
