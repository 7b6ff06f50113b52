"""The order of rows: exactly once an epoch, a pure function of the step, no row twice in a batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.data.sampler import ShuffledSchedule, epoch_order
from jaxrl_llm.errors import UserError

SIZES = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(0, 2**40))
def test_each_row_exactly_once_an_epoch_and_at_most_once_a_batch(sizes, seed):
    n, batch_size = sizes
    schedule = ShuffledSchedule(n, batch_size, seed)
    batches = [schedule.batch(step) for step in range(-(-3 * n // batch_size))]
    assert all(len(batch) == len(set(batch.tolist())) == batch_size for batch in batches)
    used = np.concatenate(batches)
    for epoch in range(3):
        assert sorted(used[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(0, 100), st.lists(st.integers(0, 200), max_size=5))
def test_a_step_is_the_same_whatever_was_asked_before(sizes, seed, asked):
    n, batch_size = sizes
    warm = ShuffledSchedule(n, batch_size, seed)
    for step in asked:
        warm.batch(step)
        assert warm.batch(step).tolist() == ShuffledSchedule(n, batch_size, seed).batch(step).tolist()


def test_order_is_stable_across_versions_and_differs_by_epoch_and_seed():
    assert epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    orders = {tuple(epoch_order(50, epoch, seed)) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_positions_are_unbiased():
    firsts = np.bincount([epoch_order(5, epoch, 3)[0] for epoch in range(2000)], minlength=5)
    assert firsts.min() > 320 and firsts.max() < 480


def test_handing_out_a_batch_does_not_let_the_caller_change_the_order():
    schedule = ShuffledSchedule(6, 2, 0)
    expected = ShuffledSchedule(6, 2, 0).batch(0).tolist()
    schedule.batch(0)[:] = 0
    assert schedule.batch(0).tolist() == expected


def test_state_is_empty_and_observing_changes_nothing():
    schedule = ShuffledSchedule(6, 2, 0)
    before = schedule.batch(4).tolist()
    schedule.observe(0, np.array([0, 1]), np.array([1.0, 0.0]))
    schedule.restore(schedule.state())
    assert schedule.state() == {} and schedule.batch(4).tolist() == before


def test_impossible_batches():
    with pytest.raises(UserError, match="batch size 7 is larger than the 6 rows"):
        ShuffledSchedule(6, 7)
    with pytest.raises(UserError, match="batch size 0"):
        ShuffledSchedule(6, 0)
