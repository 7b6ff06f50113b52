"""Verdicts: what may carry a score, and how verdicts become masked numbers."""

import dataclasses

import numpy as np
import pytest

from jaxrl_llm.rewards.verdict import Status, Verdict, reward_values


@pytest.mark.parametrize("status", [Status.ERROR, Status.TIMEOUT, Status.NOT_APPLICABLE])
def test_only_statements_carry_a_score(status):
    with pytest.raises(ValueError, match="carries no score"):
        Verdict(status, 0.0)
    assert Verdict(status).value is None


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_is_finite(score):
    with pytest.raises(ValueError, match="finite"):
        Verdict(Status.PASS, score)


def test_values_and_mask():
    verdicts = [
        Verdict(Status.PASS),
        Verdict(Status.FAIL),
        Verdict(Status.FAIL, 0.25),
        Verdict(Status.ERROR, reason="judge down"),
        Verdict(Status.PASS, 0.75),
        Verdict(Status.TIMEOUT),
    ]
    values, valid = reward_values(verdicts)
    assert values.dtype == np.float32 and valid.dtype == bool
    np.testing.assert_array_equal(values, np.array([1, 0, 0.25, 0, 0.75, 0], np.float32))
    np.testing.assert_array_equal(valid, [True, True, True, False, True, False])


def test_no_verdicts_give_empty_arrays():
    values, valid = reward_values([])
    assert values.shape == valid.shape == (0,)


def test_a_verdict_is_frozen_and_takes_the_status_by_name():
    verdict = Verdict("pass")
    assert verdict.status is Status.PASS
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.score = 1.0
    with pytest.raises(ValueError, match="maybe"):
        Verdict("maybe")
