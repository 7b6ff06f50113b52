"""The feature space against plain dense arithmetic, clusters, batch diversity, baselines and duplicates."""

import numpy as np
import pytest
from scipy import sparse

from jaxrl_llm.curation.baselines import length_features, length_tfidf_features, tfidf_features
from jaxrl_llm.curation.diversity import batch_diversity, cluster, normalised_mutual_information, schedule_diversity, silhouette
from jaxrl_llm.curation.duplicates import exact_duplicates, near_duplicates
from jaxrl_llm.curation.feature_space import FeatureSpace, MatrixBlocks, dense_space
from jaxrl_llm.curation.schedule import make_schedule
from jaxrl_llm.errors import UserError


@pytest.fixture(scope="module")
def pooled():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 60, 80)
    chance = np.clip(np.linspace(0.0, 0.7, 30) * lengths[:, None] / 30, 0, 1)
    return (rng.random((80, 30)) < chance) * rng.random((80, 30)) * lengths[:, None], lengths


def plain(x, lengths, min_rows=5, max_share=0.5):
    active = (x > 0).sum(0)
    x = x[:, (active >= min_rows) & (active <= max_share * len(x))]
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    basis = np.stack([np.ones(len(x)), np.log(lengths)], axis=1)
    return x - basis @ np.linalg.lstsq(basis, x, rcond=None)[0]


def test_equals_dense_arithmetic_whatever_the_blocks(pooled):
    x, lengths = pooled
    for block_rows in (7, 1000):
        features = MatrixBlocks(sparse.csr_matrix(x), block_rows)
        view = FeatureSpace.fit(features, lengths).view(features, lengths)
        expected = plain(x, lengths)
        np.testing.assert_allclose(view.rows(np.arange(80)), expected, atol=1e-5)
        pick = np.array([3, 3, 70])
        np.testing.assert_allclose(view.rows(pick), expected[pick], atol=1e-5)
        directions = view.directions(4)
        np.testing.assert_allclose(view.project(directions), expected @ directions, atol=1e-5)


def test_length_leaves_no_trace_and_can_be_left_in(pooled):
    x, lengths = pooled
    matrix = sparse.csr_matrix(x)
    without = FeatureSpace.fit(matrix, lengths).view(matrix, lengths).reduce(6)
    with_length = FeatureSpace.fit(matrix, lengths, remove_length=False).view(matrix, lengths).reduce(6)
    correlation = [max(abs(np.corrcoef(z[:, j], np.log(lengths))[0, 1]) for j in range(6)) for z in (without, with_length)]
    assert correlation[0] < 1e-3 < 0.2 < correlation[1]


def test_frequency_filter_norm_and_new_rows(pooled):
    x, lengths = pooled
    matrix = sparse.csr_matrix(x)
    active = (x > 0).sum(0)
    for low, high in ((5, 0.5), (1, 1.0), (20, 0.3)):
        space = FeatureSpace.fit(matrix, lengths, min_rows=low, max_share=high)
        assert space.columns.tolist() == np.flatnonzero((active >= low) & (active <= high * 80)).tolist()
    space = FeatureSpace.fit(matrix, lengths)
    norms = np.linalg.norm(space.sparse_rows(matrix).toarray(), axis=1)
    assert np.allclose(norms[norms > 0], 1)
    raw = FeatureSpace.fit(matrix, lengths, normalise=False).sparse_rows(matrix).toarray()
    np.testing.assert_allclose(raw, x[:, space.columns], rtol=1e-6)
    # A new row is treated by the pool's figures, not its own.
    new = space.view(matrix[:3], lengths[:3]).rows(np.arange(3))
    np.testing.assert_allclose(new, space.view(matrix, lengths).rows(np.arange(3)), atol=1e-6)
    with pytest.raises(UserError, match="none of 30 features"):
        FeatureSpace.fit(matrix, lengths, min_rows=90)
    with pytest.raises(UserError, match="79 lengths"):
        FeatureSpace.fit(matrix, lengths[:-1])


def test_directions_are_a_truncated_svd_of_a_sample(pooled):
    x, lengths = pooled
    matrix = sparse.csr_matrix(x)
    view = FeatureSpace.fit(matrix, lengths, remove_length=False).view(matrix, lengths)
    directions = view.directions(3)
    _, _, v = np.linalg.svd(view.space.sparse_rows(matrix).toarray())
    assert np.allclose(np.abs(np.diag(v[:3] @ directions)), 1, atol=1e-2)
    assert not np.allclose(view.directions(3, fit_rows=20), directions)
    assert view.directions(99).shape[1] == min(view.space.width - 1, 79)


def test_dense_controls_lose_length_too():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 60, 50)
    x = rng.standard_normal((50, 4)) + np.log(lengths)[:, None]
    view = dense_space(x, lengths)
    basis = np.stack([np.ones(50), np.log(lengths)], axis=1)
    np.testing.assert_allclose(view.rows(np.arange(50)), x - basis @ np.linalg.lstsq(basis, x, rcond=None)[0], atol=1e-4)
    np.testing.assert_allclose(dense_space(x, lengths, remove_length=False).rows(np.arange(50)), x, atol=1e-5)


def blobs(n=120, k=4, d=5, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, n)
    return (np.eye(d)[truth] + 0.1 * rng.standard_normal((n, d))).astype(np.float32) * rng.uniform(1, 9, (n, 1)), truth


def test_clusters_find_directions_and_are_numbered_by_size():
    x, truth = blobs()
    found = cluster(x, 4, n_init=4)
    assert normalised_mutual_information(found.labels, truth) == pytest.approx(1)
    sizes = np.bincount(found.labels)
    assert (np.diff(sizes) <= 0).all() and np.allclose(np.linalg.norm(found.centers, axis=1), 1, atol=1e-4)
    assert silhouette(x, found.labels) > 0.8 > silhouette(x, np.arange(120) % 4)
    assert silhouette(x, np.zeros(120, int)) == 0.0
    assert normalised_mutual_information(found.labels, np.arange(120) % 2) < 0.1
    noise = np.random.default_rng(0).standard_normal((120, 5))
    assert cluster(noise, 6, n_init=8).inertia < cluster(noise, 6, n_init=1).inertia < cluster(noise, 6, n_init=1, max_iter=1).inertia
    with pytest.raises(UserError, match="k is 121"):
        cluster(x, 121)


def test_batch_diversity_against_hand_computed_values():
    vectors = np.array([[2.0, 0], [0, 3], [5, 0], [0, 0]])
    labels = np.array([0, 1, 0, 1])
    apart = batch_diversity(np.array([0, 1]), labels, vectors)
    assert apart["cluster_entropy"] == pytest.approx(np.log(2)) and apart["log_det"] == pytest.approx(np.log(2))
    equal = batch_diversity(np.array([0, 2]), labels, vectors)
    assert equal["cluster_entropy"] == 0 and equal["log_det"] == pytest.approx(np.log(3) / 2)


def test_schedules_differ_in_diversity():
    x, truth = blobs(n=160)
    options = {"batch_size": 10, "cluster": truth, "difficulty": np.random.default_rng(1).random(160)}
    means = {
        kind: {k: v["mean"] for k, v in schedule_diversity(make_schedule(kind, **options), 16, truth, x).items()}
        for kind in ("published", "round_robin", "shuffled")
    }
    for name in ("cluster_entropy", "log_det"):
        assert means["published"][name] < means["shuffled"][name] < means["round_robin"][name] + 1e-9
    assert len(schedule_diversity(make_schedule("shuffled", **options), 5, truth, x)["log_det"]["by_step"]) == 5


def test_baselines():
    texts = ["4 7 + 8 =", "4 7 - 8 =", "why ?", "why not"]
    np.testing.assert_allclose(length_features(texts)[0], np.log1p([9, 5, 3]), rtol=1e-6)
    matrix = tfidf_features(texts)
    assert matrix.shape[0] == 4 and np.allclose(np.linalg.norm(matrix.toarray(), axis=1)[:3], 1)
    assert matrix[0].nnz >= 5, "single digits and signs are terms"
    assert tfidf_features(texts, max_terms=2).shape[1] == 2
    assert tfidf_features(["a", "b"]).nnz == 0, "nothing repeats"
    assert tfidf_features(texts, min_rows=1).shape[1] > matrix.shape[1]
    both = length_tfidf_features(texts).toarray()
    np.testing.assert_allclose(both[:, :3].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(both[:, 3:], matrix.toarray())


TEXTS = [
    "Anna buys 3 red apples and 4 green pears at the market on a sunny day. How many pieces of fruit does she have?",
    "anna buys 3 red apples and 4 green  pears at the market on a sunny day. How many pieces of fruit does she have?",
    "Maria buys 3 red apples and 4 green pears at the market on a sunny day. How many pieces of fruit does she have?",
    "Anna buys 5 red apples and 9 green pears at the market on a sunny day. How many pieces of fruit does she have?",
    "Anna buys 4 red apples and 3 green pears at the market on a sunny day. How many pieces of fruit does she have?",
    "A train leaves at noon.",
]


def test_exact_and_near_duplicates():
    assert exact_duplicates(TEXTS).tolist() == [-1, 0, -1, -1, -1, -1]
    assert near_duplicates(TEXTS).tolist() == [-1, 0, 0, -1, -1, -1], "other numbers, or in another order: another problem"
    assert near_duplicates(TEXTS, threshold=0.99).tolist() == [-1, 0, -1, -1, -1, -1]
    assert near_duplicates(TEXTS, answers=["7", "7", "8", "7", "7", ""]).tolist() == [-1, 0, -1, -1, -1, -1]
    assert near_duplicates(TEXTS, shingle=3, threshold=0.9).tolist() == [-1, 0, 0, -1, -1, -1]
    assert near_duplicates(TEXTS, shingle=12, threshold=0.9).tolist() == [-1, 0, -1, -1, -1, -1], "one word is in more long runs"
    assert exact_duplicates([]).tolist() == near_duplicates(["x"] * 0).tolist() == []


def test_near_duplicates_by_vectors_need_the_same_numbers():
    texts = ["add 4 7 and 8 =", "8 plus 4 7 . what ? =", "take 4 7 from 8 =", "5 and 2"]
    vectors = np.array([[1, 0], [1, 0.01], [0, 1], [1, 0]])
    assert near_duplicates(texts, vectors=vectors).tolist() == [-1, 0, -1, -1]
    assert near_duplicates(texts, vectors=vectors, vector_threshold=0.99999).tolist() == [-1, -1, -1, -1]
    assert near_duplicates(texts, vectors=vectors, answers=["55", "54", "x", "7"]).tolist() == [-1, -1, -1, -1]


def test_duplicates_at_scale_keep_the_first_and_find_nearly_all():
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(300)]
    base = [" ".join(rng.choice(words, 40)) for _ in range(300)]
    copies = []
    for text in base[:100]:
        parts = text.split()
        parts[int(rng.integers(40))] = "changed"
        copies.append(" ".join(parts))
    found = near_duplicates(base + copies, threshold=0.8)
    assert (found[:300] == -1).all() and (found[300:] == np.arange(100)).mean() > 0.97
