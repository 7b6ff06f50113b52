"""The trainability band: promises of a schedule, exact resume, an estimate that learns, and every knob."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from jaxrl_llm.curation.trainability import TrainabilityBand, reduce_features
from jaxrl_llm.errors import UserError


def world(n=200, dims=6, seed=0, slope=2.0):
    """Features that determine the true pass probability, and a cluster of each prompt."""
    rng = np.random.default_rng(seed)
    features = reduce_features(rng.standard_normal((n, dims)))
    truth = expit(slope * features @ rng.standard_normal(dims) * np.sqrt(dims) / 2)
    return features, truth, rng.integers(0, 4, n)


def play(band, truth, steps, start=0, samples=8):
    """Roll out `steps` steps against binomial pass rates; returns the batches."""
    batches = []
    for step in range(start, start + steps):
        rows = band.batch(step)
        rates = np.random.default_rng([7, step]).binomial(samples, truth[rows]) / samples
        band.observe(step, rows, rates)
        batches.append(rows)
    return batches


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 50),
    batch=st.integers(1, 20),
    clusters=st.integers(1, 6),
    seed=st.integers(0, 50),
    balance=st.sampled_from(["items", "utility", "equal", "none"]),
    share=st.sampled_from([1.0, 0.6]),
    floor=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_no_row_twice_in_an_epoch_and_full_batches(n, batch, clusters, seed, balance, share, floor):
    rng = np.random.default_rng(seed)
    keep = rng.random(n) < 0.8
    length = round(share * keep.sum())
    if length < 1:
        return
    batch = min(batch, length)
    band = TrainabilityBand(
        rng.random(n), None, batch, seed=seed, keep=keep, cluster=rng.integers(0, clusters, n), balance=balance, epoch_share=share, easy_floor=floor
    )
    batches = play(band, rng.random(n), 3 * length // batch + 1)
    assert all(len(set(b)) == batch and keep[b].all() for b in batches)
    stream = np.concatenate(batches)
    for start in range(0, len(stream) - length + 1, length):
        assert len(set(stream[start : start + length])) == length


@settings(max_examples=15, deadline=None)
@given(stop=st.integers(0, 24), seed=st.integers(0, 5))
def test_resume_is_bit_exact(stop, seed):
    features, truth, cluster = world(60)

    def make():
        return TrainabilityBand(np.full(60, 0.5), features, 8, seed=seed, cluster=cluster, quality=truth, epoch_share=0.8)

    whole = make()
    expected = play(whole, truth, 25)
    first, second = make(), make()
    play(first, truth, stop)
    saved = first.state()
    first.batch(stop)  # drawn but not observed: the kill falls between
    second.restore(saved)
    rest = play(second, truth, 25 - stop, start=stop)
    assert [b.tolist() for b in rest] == [b.tolist() for b in expected[stop:]]
    for name, value in whole.state().items():
        assert value.dtype == second.state()[name].dtype and (value == second.state()[name]).all(), name


def test_batch_does_not_change_the_state_and_steps_go_in_order():
    features, truth, _ = world(40)
    band = TrainabilityBand(truth, features, 8)
    before = band.state()
    assert band.batch(0).tolist() == band.batch(0).tolist()
    assert all((before[k] == band.state()[k]).all() for k in before)
    with pytest.raises(UserError, match="next step is 0"):
        band.batch(1)
    rows = band.batch(0)
    rows[:] = 0  # the caller's copy
    assert band.batch(0).tolist() != rows.tolist()
    band.observe(0, band.batch(0), np.full(8, 0.5))
    with pytest.raises(UserError, match="next step is 1"):
        band.batch(0)


def test_estimate_learns_the_truth_from_a_flat_prior():
    features, truth, _ = world(400)
    band = TrainabilityBand(np.full(400, 0.5), features, 32, item_scale=0.0, forgetting=1.0)
    flat = band.pass_probability()
    assert np.allclose(flat, 0.5)
    play(band, truth, 12)
    assert np.corrcoef(band.pass_probability(), truth)[0, 1] > 0.95


def test_shared_weights_equal_batch_logistic_regression():
    """Without forgetting the filter is penalised logistic regression on all the counts (up to its quadratic memory)."""
    features, truth, _ = world(300, slope=1.0)
    band = TrainabilityBand(np.full(300, 0.5), features, 30, item_scale=0.0, forgetting=1.0, easy_floor=0.0, samples_per_prompt=64)
    rows = np.concatenate(play(band, truth, 10, samples=64))
    rates = np.concatenate([np.random.default_rng([7, s]).binomial(64, truth[band_rows]) / 64 for s, band_rows in enumerate(rows.reshape(10, 30))])
    x = np.concatenate([features[rows], features[rows]])
    y, weight = np.repeat([1, 0], 300), 64 * np.concatenate([rates, 1 - rates])
    reference = LogisticRegression(C=1.0, tol=1e-8).fit(x, y, sample_weight=weight)
    assert np.allclose(band.state()["weights"][2:], reference.coef_[0], atol=0.08)


def test_a_wrong_prior_is_mended_without_overshoot():
    features, truth, _ = world(200, slope=0.0)  # all 0.5
    band = TrainabilityBand(np.full(200, 0.0), features, 32)
    play(band, truth, 3)
    estimate = band.pass_probability()
    assert 0.35 < np.median(estimate) < 0.65 and np.isfinite(band.state()["weights"]).all()


def test_own_record_counts_beside_the_features():
    """Two prompts with equal features and different pass rates are told apart only by item_scale > 0."""
    features = np.zeros((20, 2), np.float32)
    truth = np.repeat([0.1, 0.9], 10)
    with_own, without = (TrainabilityBand(np.full(20, 0.5), features, 20, item_scale=s) for s in (1.0, 0.0))
    play(with_own, truth, 4)
    play(without, truth, 4)
    assert with_own.pass_probability()[:10].mean() < 0.3 < 0.7 < with_own.pass_probability()[10:].mean()
    assert np.ptp(without.pass_probability()) < 1e-6


def test_forgetting_follows_a_policy_that_improves():
    features, _, _ = world(400)
    slow, fast = (TrainabilityBand(np.full(400, 0.5), features, 32, forgetting=f, item_scale=0.0) for f in (1.0, 0.7))
    for band in (slow, fast):
        play(band, np.full(400, 0.2), 20)
        play(band, np.full(400, 0.8), 4, start=20)
    assert fast.pass_probability().mean() > slow.pass_probability().mean() + 0.1


def test_band_prefers_the_middle_and_moves_with_the_policy():
    prior = np.linspace(0.01, 0.99, 2000)
    band = TrainabilityBand(prior, None, 30, easy_floor=0.0, temperature=0.1)
    assert np.abs(prior[band.batch(0)] - 0.5).mean() < 0.15
    for step in range(6):  # everything passes far more often than the prior said: harder prompts move into the band
        rows = band.batch(step)
        band.observe(step, rows, np.minimum(prior[rows] + 0.35, 1.0))
    assert prior[band.batch(6)].mean() < 0.35
    frozen = TrainabilityBand(prior, None, 30, easy_floor=0.0, temperature=0.1, learn=False)
    for step in range(6):
        frozen.observe(step, frozen.batch(step), np.ones(30))
    assert (frozen.pass_probability() == TrainabilityBand(prior, None, 30).pass_probability()).all()


def test_temperature_floor_and_epoch_share():
    prior = np.linspace(0.01, 0.99, 300)

    def spread(**options):
        band = TrainabilityBand(prior, None, 40, **{"easy_floor": 0.0, **options})
        return np.abs(prior[band.batch(0)] - 0.5).mean()

    assert spread(temperature=0.05) < spread(temperature=0.5) < spread(temperature=50.0)
    easy = TrainabilityBand(prior, None, 40, easy_floor=0.25, temperature=0.05)
    assert (prior[easy.batch(0)] >= 0.75).sum() == 10
    easier = TrainabilityBand(prior, None, 40, easy_floor=0.25, temperature=0.05, easy_above=0.95)
    assert (prior[easier.batch(0)] >= 0.95).sum() == 10
    none_easy = TrainabilityBand(prior * 0.5, None, 40, easy_floor=0.25, temperature=0.05)
    assert set(np.arange(290, 300)) <= set(none_easy.batch(0))  # the easiest there are
    half = TrainabilityBand(prior, None, 30, easy_floor=0.0, temperature=0.05, epoch_share=0.5, learn=False)
    rows = np.concatenate(play(half, prior, 5))
    assert np.abs(prior[rows] - 0.5).max() < 0.4  # the least useful half is passed over
    assert set(play(half, prior, 1, start=5)[0]) & set(rows)  # and then a new epoch begins


def test_quality_and_utility_weights():
    prior, quality = np.full(200, 0.5), np.repeat([1.0, 0.01], 100)
    weighted = TrainabilityBand(prior, None, 50, quality=quality, easy_floor=0.0).batch(0)
    unweighted = TrainabilityBand(prior, None, 50, quality=quality, quality_power=0.0, easy_floor=0.0).batch(0)
    assert (weighted < 100).mean() > 0.9 > (unweighted < 100).mean()
    prior = np.repeat([0.5, 0.15], 100)  # eight samples: p (1 - p) differs twofold, being mixed hardly
    share = {
        u: np.mean([(TrainabilityBand(prior, None, 60, utility=u, temperature=0.2, easy_floor=0.0, seed=s).batch(0) < 100).mean() for s in range(5)])
        for u in ("variance", "mixed_group")
    }
    assert share["variance"] > share["mixed_group"] + 0.1
    few = TrainabilityBand(prior, None, 60, utility="mixed_group", samples_per_prompt=2, temperature=0.2, easy_floor=0.0)
    assert (few.batch(0) < 100).mean() > share["mixed_group"]


def test_balance_over_clusters():
    prior = np.repeat([0.5, 0.05], 100)  # cluster 0 is all useful, cluster 1 hardly
    cluster = np.repeat([0, 1], 100)

    def shares(balance, cluster=cluster, prior=prior):
        band = TrainabilityBand(prior, None, 40, cluster=cluster, balance=balance, easy_floor=0.0, temperature=0.3)
        return np.bincount(cluster[band.batch(0)], minlength=2) / 40

    assert shares("items").tolist() == shares("equal").tolist() == [0.5, 0.5]
    assert shares("none")[1] < 0.3 and shares("utility")[1] < 0.3
    uneven = np.repeat([0, 1], [150, 50])
    assert shares("items", uneven, np.full(200, 0.5)).tolist() == [0.75, 0.25]
    assert shares("equal", uneven, np.full(200, 0.5)).tolist() == [0.5, 0.5]


def test_unknown_rates_count_as_drawn_and_teach_nothing():
    features, truth, _ = world(40)
    band = TrainabilityBand(truth, features, 10)
    rows, before = band.batch(0), band.pass_probability()
    band.observe(0, rows, np.full(10, np.nan))
    assert (band.pass_probability() == before).all()
    assert not set(rows) & set(band.batch(1))
    rates = np.full(10, np.nan)
    rates[0] = 1.0
    second = band.batch(1)
    band.observe(1, second, rates)
    assert band.pass_probability()[second[0]] > before[second[0]]


def test_rows_are_kept_anew_by_the_policy_at_its_steps_only():
    features, truth, cluster = world(40)
    asked = []

    def refilter(params):
        asked.append(params)
        return np.arange(40) % 2 == len(asked) % 2

    band = TrainabilityBand(truth, features, 4, cluster=cluster, refilter=refilter, refilter_every=3)
    rows = []
    for step in range(8):
        band.see_policy(step, f"policy {step}")
        rows.append(band.batch(step))
        band.observe(step, rows[-1], truth[rows[-1]])
    assert asked == ["policy 3", "policy 6"]
    assert (np.concatenate(rows[3:6]) % 2 == 1).all() and (np.concatenate(rows[6:]) % 2 == 0).all()
    assert len(set(np.concatenate(rows[:3]) % 2)) == 2
    # The rows kept are part of the state: a run that goes on between two of its steps draws the same.
    again = TrainabilityBand(truth, features, 4, cluster=cluster, refilter=refilter, refilter_every=3)
    again.restore(band.state())
    again.see_policy(8, None)
    band.see_policy(8, None)
    assert again.batch(8).tolist() == band.batch(8).tolist() and len(asked) == 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 200),
    batch=st.integers(1, 8),
    balance=st.sampled_from(["items", "utility", "equal", "none"]),
    share=st.sampled_from([1.0, 0.6]),
)
def test_batches_stay_full_however_few_rows_a_refilter_leaves(seed, batch, balance, share):
    """It may leave fewer open rows than the epoch still wants: the next one then fills the batch."""
    rng = np.random.default_rng(seed)
    keeps = [rng.permutation(40) < rng.integers(batch, 41) for _ in range(12)]
    asked = iter(keeps)
    kept = np.ones(40, bool)
    band = TrainabilityBand(
        rng.random(40), None, batch, cluster=rng.integers(0, 5, 40), balance=balance, epoch_share=share,
        refilter=lambda params: next(asked), refilter_every=2,
    )  # fmt: skip
    for step in range(24):
        band.see_policy(step, None)
        kept = keeps[step // 2 - 1] if step >= 2 else kept
        rows = band.batch(step)
        assert len(set(rows)) == batch and kept[rows].all()
        band.observe(step, rows, np.full(batch, 0.5))


def test_too_few_kept_rows_are_named():
    band = TrainabilityBand(np.full(9, 0.5), None, 4, refilter=lambda params: np.arange(9) < 3, refilter_every=1)
    band.observe(0, band.batch(0), np.full(4, 0.5))
    with pytest.raises(UserError, match="kept 3 of 9"):
        band.see_policy(1, None)


def test_ridge_holds_the_weights_back():
    features, truth, _ = world(200)
    loose, tight = (TrainabilityBand(np.full(200, 0.5), features, 32, ridge=r) for r in (0.1, 100.0))
    for band in (loose, tight):
        play(band, truth, 4)
    assert np.linalg.norm(tight.state()["weights"]) < 0.5 * np.linalg.norm(loose.state()["weights"])


def test_reduce_features():
    x = np.random.default_rng(0).standard_normal((50, 30))
    dense, from_sparse = reduce_features(x, 8), reduce_features(sparse.csr_matrix(x), 8)
    assert dense.shape == (50, 8) and np.allclose(np.abs(dense), np.abs(from_sparse), atol=1e-4)
    assert np.isclose(np.square(dense).sum(axis=1).mean(), 1, atol=1e-5) and np.allclose(dense.mean(axis=0), 0, atol=1e-6)
    narrow = reduce_features(sparse.csr_matrix(x[:, :5]), 8)
    assert narrow.shape == (50, 5)
    assert reduce_features(np.zeros((4, 3))).tolist() == np.zeros((4, 3)).tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prior_pass": np.array([0.5, 1.5, 0.5])}, "lie in"),
        ({"prior_pass": np.array([0.5, np.nan, 0.5])}, "NaN"),
        ({"batch_size": 4}, "epoch has 3"),
        ({"epoch_share": 0.3}, "epoch has 1"),
        ({"cluster": np.zeros(2)}, "cluster has 2"),
        ({"balance": "some"}, "balance is one of"),
        ({"temperature": 0.0}, "temperature"),
        ({"forgetting": 0.0}, "forgetting"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"prior_pass": np.full(3, 0.5), "features": None, "batch_size": 2, **change}
    with pytest.raises(UserError, match=message):
        TrainabilityBand(**arguments)


def test_wrong_observations_and_states_are_named():
    band = TrainabilityBand(np.full(5, 0.5), None, 2)
    with pytest.raises(UserError, match="pass rates"):
        band.observe(0, np.array([0, 1]), np.array([0.5]))
    with pytest.raises(UserError, match="lie in"):
        band.observe(0, np.array([0, 1]), np.array([0.5, 1.1]))
    with pytest.raises(UserError, match="shape"):
        band.restore(TrainabilityBand(np.full(6, 0.5), None, 2).state())
    with pytest.raises(UserError, match="holds"):
        band.restore({})
