"""Offline schedules: each row once an epoch, any step by itself, and each kind orders as its definition says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.curation.schedule import KINDS, make_schedule, random_clusters
from jaxrl_llm.errors import UserError


def signals(n, clusters, seed=0):
    rng = np.random.default_rng(seed)
    return {"cluster": rng.integers(0, clusters, n), "difficulty": rng.random(n)}


def first_batches(schedule, steps):
    return [schedule.batch(t) for t in range(steps)]


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    n=st.integers(1, 60),
    batch=st.integers(1, 20),
    clusters=st.integers(1, 9),
    seed=st.integers(0, 99),
    drop=st.booleans(),
)
def test_every_kept_row_once_an_epoch_and_full_batches(kind, n, batch, clusters, seed, drop):
    given_signals = signals(n, clusters, seed)
    keep = np.random.default_rng(seed).random(n) < 0.7 if drop else np.ones(n, bool)
    kept = np.flatnonzero(keep)
    batch = min(batch, len(kept))
    if not len(kept):
        return
    schedule = make_schedule(kind, batch_size=batch, seed=seed, keep=keep, **given_signals)
    epochs = 3
    batches = first_batches(schedule, -(-epochs * len(kept) // batch))
    assert all(len(b) == batch and len(set(b)) == batch for b in batches)
    stream = np.concatenate(batches)
    for epoch in range(epochs):
        assert sorted(stream[epoch * len(kept) : (epoch + 1) * len(kept)]) == kept.tolist()


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(sorted(KINDS)), n=st.integers(5, 50), batch=st.integers(1, 5), step=st.integers(0, 60), seed=st.integers(0, 9))
def test_any_step_can_be_asked_for_directly(kind, n, batch, step, seed):
    walked = make_schedule(kind, batch_size=batch, seed=seed, **signals(n, 4))
    expected = first_batches(walked, step + 1)[-1]
    jumped = make_schedule(kind, batch_size=batch, seed=seed, **signals(n, 4))
    jumped.restore({})
    assert jumped.batch(step).tolist() == expected.tolist()
    assert walked.batch(step // 2).tolist() == jumped.batch(step // 2).tolist()  # and backwards
    assert jumped.state() == {}


@pytest.mark.parametrize("kind", ["shuffled", "published", "soft", "round_robin", "dirichlet", "e2h_gaussian", "random_clusters"])
def test_seed_and_epoch_change_the_order(kind):
    one, two = (first_batches(make_schedule(kind, batch_size=5, seed=s, **signals(60, 4)), 24) for s in (0, 1))
    assert np.concatenate(one).tolist() != np.concatenate(two).tolist()
    assert np.concatenate(one[:12]).tolist() != np.concatenate(one[12:]).tolist()


def test_global_sort_and_reversed():
    given_signals = signals(30, 3)
    order = np.argsort(given_signals["difficulty"])
    forward = np.concatenate(first_batches(make_schedule("global_sort", batch_size=6, **given_signals), 5))
    backward = np.concatenate(first_batches(make_schedule("reversed", batch_size=6, **given_signals), 5))
    assert forward.tolist() == order.tolist()
    assert backward.tolist() == order[::-1].tolist()


def even_clusters(per_cluster, clusters):
    """Clusters of equal size, a multiple of the batch, so that every batch can be pure."""
    cluster = np.repeat(np.arange(clusters), per_cluster)
    difficulty = np.random.default_rng(3).random(len(cluster))
    return {"cluster": cluster, "difficulty": difficulty}


@pytest.mark.parametrize("alternate", ["parallel", "cycle"])
def test_published_order_without_mixing(alternate):
    given_signals = even_clusters(40, 4)
    schedule = make_schedule("published", batch_size=10, rho=0.0, alternate=alternate, **given_signals)
    batches = first_batches(schedule, 16)
    labels = [set(given_signals["cluster"][b]) for b in batches]
    assert all(len(label) == 1 for label in labels), "batches of one cluster"
    assert all(a != b for a, b in zip(labels, labels[1:])), "clusters alternate"
    for c in range(4):
        mine = np.concatenate([b for b, label in zip(batches, labels) if label == {c}])
        assert (np.diff(given_signals["difficulty"][mine]) > 0).all(), "easy to hard inside the cluster"


@pytest.mark.parametrize("rho, moved", [(0.1, 1), (0.2, 2), (0.5, 5)])
def test_rho_swaps_the_tail_with_the_next_batchs_head(rho, moved):
    given_signals = even_clusters(40, 4)
    pure = first_batches(make_schedule("published", batch_size=10, rho=0.0, **given_signals), 16)
    mixed = first_batches(make_schedule("published", batch_size=10, rho=rho, **given_signals), 16)
    expected = [b.copy() for b in pure]
    for a, b in zip(expected, expected[1:]):
        a[-moved:], b[:moved] = b[:moved].copy(), a[-moved:].copy()
    assert [b.tolist() for b in mixed] == [b.tolist() for b in expected]


def test_within_and_alternate_matter():
    uneven = {"cluster": np.repeat([0, 1, 2], [60, 20, 20]), "difficulty": np.random.default_rng(1).random(100)}

    def make(**options):
        return first_batches(make_schedule("published", batch_size=10, rho=0.0, **uneven, **options), 10)

    hard_first = make(within="hard_to_easy")
    mine = np.concatenate([b for b in hard_first if set(uneven["cluster"][b]) == {0}])
    assert (np.diff(uneven["difficulty"][mine]) < 0).all()
    shuffled = np.concatenate([b for b in make(within="shuffled") if set(uneven["cluster"][b]) == {0}])
    assert not (np.diff(uneven["difficulty"][shuffled]) > 0).all()
    # In cycles the two small clusters are done after two visits; in parallel they last as long as the large one.
    last_small = {
        a: max(t for seed in range(5) for t, b in enumerate(make(alternate=a, seed=seed)) if 1 in uneven["cluster"][b]) for a in ("cycle", "parallel")
    }
    assert last_small["cycle"] <= 5 < 7 <= last_small["parallel"]


def test_leftovers_share_batches_of_few_clusters():
    cluster = np.repeat(np.arange(5), 14)  # 10 fill a batch, 4 are left over in each: 20 rows, two batches
    difficulty = np.random.default_rng(0).random(70)
    batches = first_batches(make_schedule("published", batch_size=10, rho=0.0, cluster=cluster, difficulty=difficulty), 7)
    kinds = sorted(len(set(cluster[b])) for b in batches)
    assert kinds[:5] == [1] * 5 and max(kinds) <= 4
    assert all((np.diff(difficulty[b]) > 0).all() for b in batches)


def test_random_clusters_are_not_the_given_ones():
    given_signals = even_clusters(40, 4)
    batches = first_batches(make_schedule("random_clusters", batch_size=10, rho=0.0, **given_signals), 16)
    assert max(len(set(given_signals["cluster"][b])) for b in batches) > 1


def test_round_robin_shares():
    uneven = {"cluster": np.repeat([0, 1], [30, 10]), "difficulty": np.random.default_rng(1).random(40)}
    equal = make_schedule("round_robin", batch_size=4, **uneven)
    assert all(np.bincount(uneven["cluster"][equal.batch(t)]).tolist() == [2, 2] for t in range(5))
    proportional = make_schedule("round_robin", batch_size=4, share="proportional", **uneven)
    assert np.bincount(uneven["cluster"][np.concatenate(first_batches(proportional, 5))], minlength=2).tolist() == [15, 5]
    shuffled = make_schedule("round_robin", batch_size=4, within="shuffled", **uneven)
    assert {tuple(sorted(shuffled.batch(t))) for t in range(9)} != {tuple(sorted(equal.batch(t))) for t in range(9)}


def test_dirichlet_alpha_sets_the_clusters_of_a_batch():
    given_signals = even_clusters(40, 8)

    def mean_clusters(alpha):
        schedule = make_schedule("dirichlet", batch_size=16, alpha=alpha, **given_signals)
        return np.mean([len(set(given_signals["cluster"][b])) for b in first_batches(schedule, 8)])

    assert mean_clusters(0.05) < 4 < 6 < mean_clusters(50.0)


def test_e2h_gaussian_moves_through_the_buckets():
    given_signals = {"cluster": np.zeros(400, int), "difficulty": np.linspace(0, 1, 400)}

    def means(**options):
        batches = first_batches(make_schedule("e2h_gaussian", batch_size=20, **given_signals, **options), 20)
        return np.array([given_signals["difficulty"][b].mean() for b in batches])

    default = means()
    assert default[:3].mean() < 0.4 < 0.6 < default[-3:].mean()
    assert (means(sigma=0.3)[0]) < 0.25 < means(sigma=50.0)[0]
    assert means(floor=0.2)[0] > default[0]
    assert means(power=3.0)[5:10].mean() < default[5:10].mean()
    assert means(buckets=2)[0] > default[0]


def test_soft_floor_temperature_and_clusters():
    given_signals = even_clusters(100, 4)
    difficulty, cluster = given_signals["difficulty"], given_signals["cluster"]
    easy = difficulty <= np.quantile(difficulty, 1 / 3)

    def batches(**options):
        return first_batches(make_schedule("soft", batch_size=20, **{"easy_floor": 0.15, **options}, **given_signals), 20)

    assert min(easy[b].sum() for b in batches()) >= 3
    assert min(easy[b].sum() for b in batches(easy_floor=0.0, temperature=0.0)) == 0
    easiest = difficulty <= np.quantile(difficulty, 0.1)
    assert min(easiest[b].sum() for b in batches(easy_quantile=0.1, easy_floor=0.05)) >= 1 > min(easiest[b].sum() for b in batches())

    def trend(parts):
        return np.corrcoef(np.arange(20), [difficulty[b].mean() for b in parts])[0, 1]

    assert trend(batches(temperature=0.05)) > 0.9 > trend(batches(temperature=5.0))
    # Cold, without a floor: inside clusters every batch mirrors the clusters; over all, it is the global sort.
    assert all(np.abs(np.bincount(cluster[b], minlength=4) - 5).max() <= 1 for b in batches(temperature=0.0, easy_floor=0.0, by_cluster=True))
    assert (np.diff(difficulty[np.concatenate([np.sort(b) for b in batches(temperature=0.0, easy_floor=0.0, by_cluster=False)[:1]])]) != 0).all()
    means = [difficulty[b].max() for b in batches(temperature=0.0, easy_floor=0.0, by_cluster=False)]
    assert means == sorted(means)


def test_random_clusters_are_of_equal_size():
    labels = random_clusters(10, 3, seed=1)
    assert sorted(np.bincount(labels)) == [3, 3, 4]
    assert labels.tolist() != random_clusters(10, 3, seed=2).tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "publisht"}, "no kind 'publisht'"),
        ({"batch_size": 11}, "10 kept prompts"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rho": 0.6}, "rho is 0.6"),
        ({"within": "easy"}, "within is 'easy'"),
        ({"temperatur": 1.0}, "no option 'temperatur'"),
        ({"cluster": np.zeros(9, int)}, "10 rows"),
        ({"keep": np.ones(9, bool)}, "10 rows"),
        ({"difficulty": np.array([0.0] * 9 + [np.nan])}, "row 9"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"kind": "published", "batch_size": 2, **signals(10, 2), **change}
    with pytest.raises(UserError, match=message):
        make_schedule(arguments.pop("kind"), **arguments)


def test_negative_step_and_foreign_state_are_refused():
    schedule = make_schedule("shuffled", batch_size=2, **signals(10, 2))
    with pytest.raises(UserError, match="step is -1"):
        schedule.batch(-1)
    with pytest.raises(UserError, match="used"):
        schedule.restore({"used": np.zeros(3)})
    schedule.observe(0, np.array([1]), np.array([0.5]))  # accepted, and changes nothing
    assert schedule.state() == {}
