"""Rewards by name, and scoring that always answers with one verdict an input."""

import threading
import time

import numpy as np
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards import registry
from jaxrl_llm.rewards.registry import get_reward, reward_names, score
from jaxrl_llm.rewards.verdict import RewardInput, Status, Verdict

PASS = Verdict(Status.PASS)


def inputs(*responses):
    return [RewardInput("", response, "gold") for response in responses]


def test_rewards_by_name():
    assert {"exact", "maths", "constraints"} <= set(reward_names())
    verdicts = get_reward("maths", rel_tol=0.5)([RewardInput("", "1.4", "1")])
    assert verdicts[0].status is Status.PASS
    row = {"constraints": [{"name": "punctuation:no_comma"}, {"name": "startend:quotation"}]}
    assert get_reward("constraints", reduce="mean")([RewardInput("", "a", row=row)])[0].value == 0.5


@pytest.mark.parametrize(
    "name, kwargs, message",
    [
        ("math", {}, "unknown reward 'math'; did you mean maths?"),
        ("maths", {"rel_tolerance": 1}, "reward maths has no parameter 'rel_tolerance'; did you mean rel_tol?"),
        ("exact", {"x": 1}, "reward exact has no parameter 'x'"),
    ],
)
def test_unknown_names(name, kwargs, message):
    with pytest.raises(UserError) as error:
        get_reward(name, **kwargs)
    assert message in str(error.value)


def test_registering(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))

    @registry.register("always")
    def make(value=1.0):
        return lambda batch: [Verdict(Status.PASS, value)] * len(batch)

    assert get_reward("always", value=0.5)(inputs("a", "b"))[1].value == 0.5
    registry.register("always")(make)  # again by the same factory: a module may be reloaded
    with pytest.raises(ValueError, match="taken"):
        registry.register("always")(lambda: None)


def test_exact_match():
    reward = get_reward("exact")
    rows = [("The  Cat\n", "the cat"), ("cafe\u0301", "caf\u00e9"), ("cats", "cat"), ("x", None), ("x", " ")]
    verdicts = reward([RewardInput("", response, answer) for response, answer in rows])
    assert [v.status for v in verdicts] == [Status.PASS, Status.PASS, Status.FAIL, Status.ERROR, Status.ERROR]
    strict = get_reward("exact", ignore_case=False)
    assert [v.status for v in strict([RewardInput("", "Cat", "cat"), RewardInput("", " cat", "cat")])] == [Status.FAIL, Status.PASS]


def test_a_batch_that_raises_is_tried_item_by_item():
    calls = []

    def reward(batch):
        calls.append(len(batch))
        if any(item.response == "bad" for item in batch):
            raise RuntimeError("the judge choked")
        return [PASS] * len(batch)

    verdicts = score(reward, inputs("a", "bad", "c"))
    assert [v.status for v in verdicts] == [Status.PASS, Status.ERROR, Status.PASS]
    assert verdicts[1].reason == "RuntimeError: the judge choked"
    assert calls == [3, 1, 1, 1]
    assert score(reward, inputs("a", "b")) == [PASS, PASS] and calls[-1] == 2  # a batch that works is called once


@pytest.mark.parametrize(
    "answer, reason",
    [([PASS], "1 answers for 2 inputs"), (None, "NoneType for 2 inputs"), ([1.0, 0.0], "not a Verdict")],
)
def test_a_reward_that_answers_wrongly_is_an_error(answer, reason):
    verdicts = score(lambda batch: answer, inputs("a", "b"))
    assert [v.status for v in verdicts] == [Status.ERROR] * 2 and reason in verdicts[0].reason


def test_a_mistake_in_one_row_costs_that_row():
    rows = [{"constraints": [{"name": "punctuation:no_comma"}]}, {"constraints": [{"name": "punctuation:no_coma"}]}]
    verdicts = score(get_reward("constraints"), [RewardInput("", "a", row=row) for row in rows])
    assert [v.status for v in verdicts] == [Status.PASS, Status.ERROR] and "did you mean" in verdicts[1].reason
    with pytest.raises(UserError, match="no_coma"):
        registry.validate_rows(get_reward("constraints"), rows)
    registry.validate_rows(get_reward("exact"), rows)  # a reward that has nothing to say about rows accepts them


def test_a_reward_that_hangs_times_out_and_keeps_what_it_had():
    release = threading.Event()

    def reward(batch):
        if len(batch) > 1:
            raise RuntimeError("one at a time")
        if batch[0].response == "hang":
            release.wait(60)
        return [PASS]

    began = time.monotonic()
    verdicts = score(reward, inputs("a", "hang", "c"), timeout_s=1.0)
    assert time.monotonic() - began < 30
    release.set()
    assert [v.status for v in verdicts] == [Status.PASS, Status.TIMEOUT, Status.TIMEOUT]
    assert score(reward, inputs("a"), timeout_s=30.0) == [PASS]


def test_an_interrupt_is_not_swallowed():
    def reward(batch):
        raise KeyboardInterrupt

    for timeout_s in (None, 30.0):
        with pytest.raises(KeyboardInterrupt):
            score(reward, inputs("a"), timeout_s)


@pytest.mark.parametrize(("rows", "processes"), [(7, 3), (2, 4), (6, 2)])
def test_processes_share_the_work_and_all_get_all_verdicts(rows, processes):
    """Shares that do not come out even, and processes with nothing to do; a score in 64 bits survives, and so does the lack of one."""
    given = inputs(*map(str, range(rows)))
    seen: list[str] = []

    def reward(items):
        seen.extend(item.response for item in items)
        made = {0: Verdict(Status.PASS, 0.1 + 1e-12, "why"), 1: Verdict(Status.FAIL), 2: Verdict(Status.ERROR, reason="broken")}
        return [made[int(item.response) % 3] for item in items]

    class Told(Exception):
        pass

    def stop(table):
        raise Told(table)

    tables = []
    for process in range(processes):
        with pytest.raises(Told) as told:
            registry.score_shared(reward, given, process, processes, stop)
        tables.append(told.value.args[0])
    assert sorted(seen) == [str(i) for i in range(rows)], "each row once"
    wanted = registry.score_shared(reward, given, 0, 1, stop)
    for process in range(processes):
        found = registry.score_shared(reward, given, process, processes, lambda table: np.concatenate(tables))
        assert [(v.status, v.score) for v in found] == [(v.status, v.score) for v in wanted]
