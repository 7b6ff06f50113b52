"""Rewards by name, and the one way to score a batch.

A reward's factory takes keyword arguments and returns a callable `reward(inputs: list[RewardInput]) -> list[Verdict]`. To add one:

    @register("mine")
    def make_mine(strength: float = 1.0) -> Reward: ...
"""

from __future__ import annotations

import inspect
import queue
import re
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.rewards.constraints import ConstraintsReward
from jaxrl_llm.rewards.judge import JudgeReward
from jaxrl_llm.rewards.maths import MathsReward
from jaxrl_llm.rewards.verdict import Reward, RewardInput, RewardStopped, Status, Verdict
from jaxrl_llm.rewards.verif import VerifReward

_FACTORIES: dict[str, Callable[..., Reward]] = {}


def register(name: str) -> Callable[[Callable[..., Reward]], Callable[..., Reward]]:
    """Decorator: makes a reward factory known under `name`. Raises ValueError where the name is taken by a factory of another module or name; the
    same one comes again where its module is loaded anew, as a config file is."""

    def add(factory: Callable[..., Reward]) -> Callable[..., Reward]:
        place = lambda one: (one.__module__, one.__qualname__)  # noqa: E731
        if name in _FACTORIES and place(_FACTORIES[name]) != place(factory):
            raise ValueError(f"the reward name {name!r} is taken")
        _FACTORIES[name] = factory
        return factory

    return add


def reward_names() -> tuple[str, ...]:
    """The known rewards."""
    return tuple(sorted(_FACTORIES))


def get_reward(name: str, **kwargs: Any) -> Reward:
    """Makes the reward `name`. Raises UserError for an unknown name or parameter, naming the nearest known one."""
    factory = _FACTORIES.get(name)
    if factory is None:
        raise UserError(f"unknown reward {name!r}; {nearest(name, _FACTORIES)}")
    parameters = inspect.signature(factory).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in kwargs:
            if key not in parameters:
                raise UserError(f"reward {name} has no parameter {key!r}; {nearest(key, parameters)}")
    return factory(**kwargs)


def validate_rows(reward: Reward, rows: Sequence[Mapping[str, Any]]) -> None:
    """Lets a reward look at the data before a run starts: calls its `validate_rows` where it has one, which raises UserError."""
    look = getattr(reward, "validate_rows", None)
    if look is not None:
        look(rows)


def score(reward: Reward, inputs: Sequence[RewardInput], timeout_s: float | None = None) -> list[Verdict]:
    """Scores a batch; always returns one Verdict an input, whatever the reward does.

    A reward that raises on the batch is called again for each input by itself, so that only those that raise alone are lost: they
    become ERROR with the exception's text. Something other than one Verdict an input is an ERROR too. Raises RewardStopped where the
    reward does: a judge that is gone would be asked for nothing at every step to come.
    timeout_s: seconds for the whole call; past it, what has no verdict yet is TIMEOUT. The reward's thread cannot be stopped and is
      left behind, so a reward that may hang should limit itself as well (maths does).
    """
    inputs = list(inputs)
    verdicts: list[Verdict | None] = [None] * len(inputs)
    if timeout_s is None:
        _score_into(reward, inputs, verdicts)
    else:
        failures: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                _score_into(reward, inputs, verdicts)
            except BaseException as error:  # handed to the caller's thread below
                failures.put(error)
            else:
                failures.put(None)

        threading.Thread(target=work, name="jaxrl-llm-reward", daemon=True).start()
        try:
            failure = failures.get(timeout=timeout_s)
        except queue.Empty:
            failure = None
        if failure is not None:
            raise failure
    late = Verdict(Status.TIMEOUT, reason=f"no verdict within {timeout_s} s")
    return [verdict or late for verdict in list(verdicts)]


_STATUSES = tuple(Status)


def score_shared(
    reward: Reward, inputs: Sequence[RewardInput], process: int, processes: int, gather: Callable[[np.ndarray], np.ndarray]
) -> list[Verdict]:
    """`score`, of which each of several processes judges an equal share of the inputs: a judge that is asked twice may answer differently,
    and all must go on with the same verdicts. They come back without reasons.

    process, processes: the number of this one, and how many there are. gather: float64 [share, 2] of this process -> those of all
    processes, one below the other, bit for bit.
    """
    if processes == 1:
        return score(reward, inputs)
    share = -(-len(inputs) // processes)
    table = np.full((share, 2), np.nan)  # status, score (NaN = none)
    for line, verdict in zip(table, score(reward, inputs[share * process : share * (process + 1)]), strict=False):
        line[:] = _STATUSES.index(verdict.status), np.nan if verdict.score is None else verdict.score
    lines = gather(table)[: len(inputs)]
    return [Verdict(_STATUSES[int(status)], None if np.isnan(found) else float(found)) for status, found in lines]


def _score_into(reward: Reward, inputs: list[RewardInput], verdicts: list[Verdict | None]) -> None:
    """Fills `verdicts` in place, so that a caller that gives up waiting still has those that are there."""
    try:
        answer = reward(inputs)
    except RewardStopped:
        raise
    except Exception:
        for index, item in enumerate(inputs):
            verdicts[index] = _score_one(reward, item)
        return
    verdicts[:] = _checked(answer, len(inputs))


def _score_one(reward: Reward, item: RewardInput) -> Verdict:
    try:
        return _checked(reward([item]), 1)[0]
    except RewardStopped:
        raise
    except Exception as error:
        return Verdict(Status.ERROR, reason=f"{type(error).__name__}: {error}")


def _checked(answer: Any, wanted: int) -> list[Verdict]:
    """The reward's answer if it is one Verdict an input, else an ERROR for every input."""
    if isinstance(answer, (list, tuple)) and len(answer) == wanted:
        return [
            entry if isinstance(entry, Verdict) else Verdict(Status.ERROR, reason=f"the reward returned {entry!r}, not a Verdict")
            for entry in answer
        ]
    size = f"{len(answer)} answers" if isinstance(answer, (list, tuple)) else type(answer).__name__
    return [Verdict(Status.ERROR, reason=f"the reward returned {size} for {wanted} inputs")] * wanted


register("maths")(MathsReward)
register("constraints")(ConstraintsReward)
register("judge")(JudgeReward)
register("verif")(VerifReward)


@register("exact")
def make_exact(ignore_case: bool = True) -> Reward:
    """PASS where the response equals the row's answer after Unicode normalisation (NFC) and with each run of white space made one space.

    ignore_case: capitals and small letters count as the same. An input without an answer is an ERROR.
    """

    def spell(text: str) -> str:
        text = re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()
        return text.casefold() if ignore_case else text

    def judge(item: RewardInput) -> Verdict:
        if item.answer is None or not item.answer.strip():
            return Verdict(Status.ERROR, reason="the row has no answer")
        if spell(item.response) == spell(item.answer):
            return Verdict(Status.PASS, reason=f"equal to {item.answer!r}")
        return Verdict(Status.FAIL, reason=f"{item.response.strip()[:80]!r} is not {item.answer!r}")

    return lambda inputs: [judge(item) for item in inputs]
