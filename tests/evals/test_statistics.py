"""Comparisons of runs: hand-computed cases, coverage, and the cases that fool a naive statistic."""

import numpy as np
import pytest

from jaxrl_llm.evals import statistics as st


def test_paired_t_hand_computed():
    # differences 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653, half = 4.302653 / sqrt(3)
    out = st.paired_t(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert out.estimate == pytest.approx(2.0)
    assert out.high - out.estimate == pytest.approx(4.302653 / np.sqrt(3), rel=1e-5)
    assert not out.excludes_zero()


def test_paired_t_single_seed_claims_nothing():
    out = st.paired_t(np.array([0.9]), np.array([0.1]))
    assert out.low == -np.inf and out.high == np.inf and not out.excludes_zero()


def test_paired_bootstrap_uses_the_pairing():
    rng = np.random.default_rng(0)
    item = rng.random((6, 200))  # items differ much, arms by a constant
    out = st.paired_bootstrap(item + 0.02, item, draws=500)
    assert out.low == pytest.approx(0.02) and out.high == pytest.approx(0.02)


def test_paired_bootstrap_covers_seed_spread():
    rng = np.random.default_rng(1)
    effect = np.array([-0.1, 0.1, -0.1, 0.1])[:, None]  # the arms differ by seed, not on average
    out = st.paired_bootstrap(np.full((4, 50), 0.5) + effect, np.full((4, 50), 0.5), draws=1000)
    assert out.low < -0.04 and out.high > 0.04
    one = st.paired_bootstrap(rng.random((1, 50)), rng.random((1, 50)), draws=200)
    assert one.low < one.estimate < one.high


def test_paired_bootstrap_covers_items_that_cells_share():
    """Where an item favours one arm in every cell, drawing items anew in each cell would make the interval far too narrow."""
    rng, hits = np.random.default_rng(2), 0
    for trial in range(60):
        item, cell = rng.normal(0, 0.3, 40), rng.normal(0, 0.02, (24, 1))
        out = st.paired_bootstrap(item + cell + rng.normal(0, 0.1, (24, 40)), np.zeros((24, 40)), draws=400, seed=trial)
        hits += out.low <= 0 <= out.high
    assert hits >= 52  # 57 expected at 95%


def test_paired_bootstrap_covers_groups_of_cells():
    """Runs of one base policy are no independent evidence: what they share counts once."""
    effect = np.repeat([[-0.1], [0.0], [0.1]], 8, axis=0)
    base = np.repeat([4, 5, 6], 8)
    alone = st.paired_bootstrap(np.full((24, 30), 0.5) + effect, np.full((24, 30), 0.5))
    grouped = st.paired_bootstrap(np.full((24, 30), 0.5) + effect, np.full((24, 30), 0.5), base)
    assert grouped.estimate == pytest.approx(alone.estimate, abs=1e-12)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    same = st.paired_bootstrap(np.full((24, 30), 0.5) + effect, np.full((24, 30), 0.5), np.zeros(24))
    assert same == alone  # one group is no sample of groups


def test_expanded_limits_widen_as_students_t():
    """By hand, Phi(-sqrt(n / (n - 1)) t): t = 2.262 for 10 cells gives Phi(-2.385) = 0.0085, t = 2.776 for 5 Phi(-3.104) = 0.00096."""
    draws = np.linspace(0, 1, 100_001)
    assert st.expanded_limits(draws, 1)[0] == pytest.approx(0.025, abs=1e-4)
    assert st.expanded_limits(draws, 10)[0] == pytest.approx(0.0085, abs=1e-4)
    assert st.expanded_limits(draws, 5)[0] == pytest.approx(0.00096, abs=2e-5)


def test_steps_saved_hand_computed_and_antisymmetric():
    steps, slow, fast = [0, 10, 20], [[0.0, 0.1, 0.2]], [[0.0, 0.4, 0.4]]
    assert st.steps_saved(steps, fast, slow).estimate == pytest.approx(1 - 5 / 20)
    assert st.steps_saved(steps, slow, fast).estimate == pytest.approx(-(1 - 5 / 20))
    assert st.steps_saved(steps, [[0.3, 0.3, 0.2]], fast) is None
    one = st.steps_saved(steps, fast, slow)
    assert one.low == -np.inf and one.high == np.inf  # one run says nothing of others


def test_steps_saved_claims_nothing_of_equal_arms():
    """Two arms that differ by noise alone: zero on average, and the interval holds zero as often as it says."""
    rng, curve = np.random.default_rng(3), np.linspace(0.2, 0.3, 7)
    found = []
    for trial in range(60):
        a, b = (curve + rng.normal(0, 0.01, (12, 7)) for _ in range(2))
        found.append(st.steps_saved(10 * np.arange(7), a, b, draws=200, seed=trial))
    assert abs(np.mean([f.estimate for f in found])) < 0.03
    assert np.mean([f.low <= 0 <= f.high for f in found]) >= 0.85
    better = st.steps_saved(10 * np.arange(7), curve + 0.03 + rng.normal(0, 0.01, (12, 7)), curve + rng.normal(0, 0.01, (12, 7)))
    assert better.low > 0.1


def test_items_without_a_verdict_count_in_neither_arm():
    a, b = np.array([[1.0, np.nan, 0.5, 0.0]]), np.array([[0.0, 1.0, 0.5, np.nan]])
    found = st.paired_bootstrap(a, b)
    assert found.estimate == pytest.approx(0.5) and 0 <= found.low <= found.high <= 1
    with pytest.raises(ValueError, match="no item"):
        st.paired_bootstrap([[np.nan]], [[1.0]])


def test_paired_bootstrap_rejects_unpaired():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        st.paired_bootstrap(np.zeros((2, 3)), np.zeros((2, 4)))


def test_wilson_known_values():
    out = st.wilson(8, 10)
    assert (out.low, out.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert st.wilson(0, 10).low == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        st.wilson(11, 10)


def test_steps_to_target_interpolates():
    steps = np.array([0, 10, 20, 30])
    assert st.steps_to_target(steps, np.array([0.0, 0.2, 0.4, 0.6]), 0.3) == pytest.approx(15)
    assert st.steps_to_target(steps, np.array([0.0, 0.9, 0.1, 0.2]), 0.45) == pytest.approx(5)  # the first time counts
    assert st.steps_to_target(steps, np.array([0.0, 0.1, 0.1, 0.2]), 0.5) == np.inf
    assert st.steps_to_target(steps, np.array([0.7, 0.8, 0.8, 0.8]), 0.5) == 0
