"""k-means equal to scikit-learn from the same start; chunks, sparse input, empty clusters, restarts, mistakes."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from sklearn.cluster import KMeans as Reference
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score

import sae
from sae.points import Points, cluster_sums
from sae.sparse_points import SparsePoints

K = 5


def blobs(n=300, d=7, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    return (3 * rng.standard_normal((K, d))[rng.integers(0, K, n)] + spread * rng.standard_normal((n, d)) + 10).astype(np.float32)


def reference(x, init, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return Reference(len(init), init=init, n_init=1, algorithm="lloyd", **({"max_iter": 100, "tol": 1e-4} | kwargs)).fit(x)


def assert_equal(found, expected, rtol=1e-4):
    np.testing.assert_array_equal(found.labels, expected.labels_)
    np.testing.assert_allclose(found.centers, expected.cluster_centers_, rtol=rtol, atol=1e-4)
    assert found.inertia == pytest.approx(expected.inertia_, rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_equals_scikit_learn(seed):
    x = blobs(seed=seed, spread=2.0)
    start = x[np.random.default_rng(seed).choice(len(x), 12, replace=False)]
    assert_equal(sae.kmeans(x, 12, init=start), reference(x, start))


@pytest.mark.parametrize("kwargs", [{"max_iter": 1}, {"max_iter": 3}, {"tol": 0.0}, {"tol": 0.05}])
def test_equals_scikit_learn_when_stopped(kwargs):
    x = blobs(spread=3.0)
    assert_equal(sae.kmeans(x, K, init=x[:K], **kwargs), reference(x, x[:K], **kwargs))


def test_max_iter_and_tol_act():
    x = blobs(spread=3.0)
    inertias = [sae.kmeans(x, K, init=x[:K], **kw).inertia for kw in ({}, {"max_iter": 1}, {"tol": 0.5})]
    assert inertias[0] < inertias[1] and inertias[0] < inertias[2]


def test_one_empty_cluster_is_relocated_as_in_scikit_learn():
    x = blobs()
    start = np.concatenate([x[: K - 1], np.full((1, x.shape[1]), 1e3, np.float32)])
    found, expected = sae.kmeans(x, K, init=start), reference(x, start)
    assert_equal(found, expected)
    assert np.bincount(found.labels, minlength=K).min() > 0


def test_several_empty_clusters():
    x = blobs(spread=2.0)
    start = np.concatenate([x[:3], 1e3 + np.arange(4, dtype=np.float32)[:, None] * np.ones((4, x.shape[1]), np.float32)])
    found, expected = sae.kmeans(x, 7, init=start), reference(x, start)
    assert adjusted_rand_score(found.labels, expected.labels_) == 1.0  # which of them takes which point is free
    assert found.inertia == pytest.approx(expected.inertia_, rel=1e-5)


def test_more_clusters_than_different_points():
    x = np.repeat(np.array([[0, 0], [5, 5]], np.float32), 4, axis=0)
    found = sae.kmeans(x, 3, init=np.array([[0, 0], [5, 5], [9, 9]], np.float32))
    assert found.inertia == 0.0 and set(found.labels[:4]) != set(found.labels[4:]) and np.isfinite(found.centers).all()


@pytest.mark.parametrize("kwargs", [{"chunk": 1}, {"chunk": 37}, {"chunk": 1000}, {"stream": True}, {"stream": True, "chunk": 64}])
def test_chunks_and_streaming_change_nothing(kwargs):
    x = blobs(spread=2.0)
    whole, cut = sae.kmeans(x, 9, init=x[:9]), sae.kmeans(x, 9, init=x[:9], **kwargs)
    np.testing.assert_array_equal(cut.labels, whole.labels)
    np.testing.assert_allclose(cut.centers, whole.centers, atol=1e-4)
    assert cut.inertia == pytest.approx(whole.inertia, rel=1e-6)


def test_chunk_and_stream_set_what_is_held():
    x = blobs()
    points = Points(x, chunk=37, spherical=False, stream=False, mesh=None)
    assert points.chunk <= 37 and len(points.resident) == 9 and sum(valid for _, valid in points.resident) == len(x)
    assert Points(x, chunk=37, spherical=False, stream=True, mesh=None).resident is None
    sparse = scipy.sparse.csr_matrix(x)
    assert SparsePoints(sparse, chunk=None, spherical=False, stream=None, mesh=None).resident is None
    assert len(SparsePoints(sparse, chunk=37, spherical=False, stream=False, mesh=None).resident) == 9


def sparse_points(n=200, d=40, seed=0, density=0.2):
    rng = np.random.default_rng(seed)
    return scipy.sparse.csr_matrix((rng.random((n, d)) * (rng.random((n, d)) < density)).astype(np.float32))


@pytest.mark.parametrize("form", ["csr_matrix", "csr_array", "coo_matrix"])
@pytest.mark.parametrize("density", [0.05, 0.2])
def test_sparse_input_equals_scikit_learn_and_dense(form, density):
    x = sparse_points(density=density)
    start = x[:6].toarray()
    given = getattr(scipy.sparse, form)(x)
    assert SparsePoints(given, chunk=64, spherical=False, stream=None, mesh=None).by_entries == (density < 0.1)
    found = sae.kmeans(given, 6, init=start, chunk=64)
    assert_equal(found, reference(x, start))
    np.testing.assert_array_equal(found.labels, sae.kmeans(x.toarray(), 6, init=start).labels)


@pytest.mark.parametrize("spherical", [False, True])
def test_passes_over_entries_equal_passes_over_chunks(spherical, monkeypatch):
    """In slices, a row of zeros and two clusters that start empty included; a centre on a point is at distance 0 of it, exactly."""
    monkeypatch.setattr("sae.sparse_points.CHUNK_BYTES", 4 * 4 * 6 * 32)
    x = sparse_points(d=200, density=0.05)
    x = scipy.sparse.hstack([np.linspace(0.1, 1, 200, dtype=np.float32)[:, None], x], format="csr")  # no two rows at equal distance to all
    if not spherical:  # on the sphere it is equally far from every centre
        x.data[x.indptr[3] : x.indptr[4]] = 0
    start = np.concatenate([x[:4].toarray(), np.full((2, 201), -1e3, np.float32)])
    for init in (start, "k-means++", "random"):
        entries, chunks = (sae.kmeans(x, 6, init=init, spherical=spherical, stream=stream) for stream in (None, True))
        np.testing.assert_array_equal(entries.labels, chunks.labels)
        np.testing.assert_allclose(entries.centers, chunks.centers, atol=1e-5)
        assert entries.inertia == pytest.approx(chunks.inertia, rel=1e-5)
    ours, theirs = (SparsePoints(x, chunk=None, spherical=spherical, stream=stream, mesh=None) for stream in (None, True))
    assert ours.by_entries and not theirs.by_entries and ours.variance == theirs.variance
    start = ours.host_rows(np.arange(7))
    passes = [points.assign(start, None) for points in (ours, theirs)]
    for name in ("sums", "counts", "changed"):
        np.testing.assert_allclose(*(np.asarray(getattr(found, name)) for found in passes), atol=1e-4)
    again = ours.assign(start + 0.1, passes[0].labels)
    assert again.changed == np.sum(ours.gather(again.labels) != ours.gather(passes[0].labels)) > 0
    distances = [points.distances(start, found.labels) for points, found in zip((ours, theirs), passes, strict=True)]
    np.testing.assert_allclose(*distances, atol=1e-5)
    assert (distances[0][:7] == 0).all() and distances[0][7:].any()


def test_sparse_duplicate_entries_are_summed_and_the_callers_rows_are_left():
    x = scipy.sparse.csr_matrix((np.ones(6, np.float32), [0, 0, 5, 5, 9, 30], [0, 2, 4, 5, 6]), shape=(4, 40))
    whole = sae.kmeans(x.toarray(), 3, init=x[:3].toarray())
    found = sae.kmeans(x, 3, init=x[:3].toarray())
    np.testing.assert_array_equal(found.labels, whole.labels)
    assert x.nnz == 6 and found.inertia == pytest.approx(whole.inertia)


def test_a_nan_in_sparse_rows_is_named():
    x = sparse_points(density=0.05)
    x.data[x.indptr[40]] = np.nan
    row = int(np.flatnonzero(np.isnan(x.toarray()).any(axis=1))[0])
    with pytest.raises(sae.SAEError, match=f"row {row} of x holds a NaN"):
        sae.kmeans(x, 3)


@pytest.mark.parametrize("spherical", [False, True])
def test_candidates_of_sparse_rows_equal_those_of_dense_ones(spherical, monkeypatch):
    """Products of the entries alone, in slices, a row of zeros included."""
    x = sparse_points()
    x.data[x.indptr[3] : x.indptr[4]] = 0
    monkeypatch.setattr("sae.sparse_points.CHUNK_BYTES", 4 * 4 * 3 * 64)
    common = {"chunk": 64, "spherical": spherical, "stream": True, "mesh": None}
    thin, dense = SparsePoints(x, **common), Points(x.toarray(), **common)
    picked = np.array([0, 3, 50])
    candidates = thin.host_rows(picked)
    nearest = np.linspace(0.1, 3.0, x.shape[0]).astype(np.float32)
    thin_form = thin.candidate_distances(candidates, nearest)
    moved = candidates - dense.mean  # dense rows are centred
    np.testing.assert_allclose(thin_form, dense.candidate_distances(moved, nearest), atol=1e-5)
    assert candidates.shape == (3, 40) and (thin_form < nearest).any() and (thin_form == nearest[None]).any()


def test_sparse_rows_are_never_dense_together(monkeypatch):
    x, sizes = sparse_points(), []
    whole = SparsePoints._raw
    monkeypatch.setattr(SparsePoints, "_raw", lambda self, index: sizes.append(len(rows := whole(self, index))) or rows)
    sae.kmeans(x, 4, chunk=32)
    assert max(sizes) <= 32


def test_jax_array_and_memmap(tmp_path):
    x = blobs()
    file = np.memmap(tmp_path / "x", np.float32, "w+", shape=x.shape)
    file[:] = x
    labels = sae.kmeans(x, K, init=x[:K]).labels
    for form in (jnp.asarray(x), file, x.astype(np.float64)):
        np.testing.assert_array_equal(sae.kmeans(form, K, init=x[:K]).labels, labels)


def test_plus_plus_finds_separated_blobs_and_beats_random():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 10, 500)
    x = (20 * rng.standard_normal((10, 4))[truth] + rng.standard_normal((500, 4))).astype(np.float32)
    assert adjusted_rand_score(truth, sae.kmeans(x, 10, n_init=3).labels) > 0.99
    inertia = {init: np.mean([sae.kmeans(x, 10, init=init, seed=s).inertia for s in range(4)]) for init in ("k-means++", "random")}
    assert inertia["k-means++"] < inertia["random"]


def test_plus_plus_never_repeats_a_point():
    x = np.repeat(np.arange(6, dtype=np.float32)[:, None], 5, axis=0) * 100
    found = sae.kmeans(x, 6)
    assert found.inertia == pytest.approx(0.0, abs=1e-6) and len(set(found.labels)) == 6


def test_seed_and_restarts():
    x = blobs(spread=4.0)
    a, b = sae.kmeans(x, 12, init="random", seed=3), sae.kmeans(x, 12, init="random", seed=3)
    np.testing.assert_array_equal(a.labels, b.labels)
    singles = [sae.kmeans(x, 12, init="random", seed=s).inertia for s in range(4)]
    assert len(set(singles)) > 1
    worst = int(np.argmax(singles))
    runs = [sae.kmeans(x, 12, init="random", seed=worst, n_init=n).inertia for n in (1, 6)]
    assert runs[1] < runs[0]


def test_spherical_ignores_length():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 200)
    directions = np.eye(3, 5)[truth] + 0.05 * rng.standard_normal((200, 5))
    x = (directions * rng.uniform(0.1, 100, (200, 1))).astype(np.float32)
    found = sae.kmeans(x, 3, spherical=True, n_init=3)
    assert adjusted_rand_score(truth, found.labels) == 1.0 and adjusted_rand_score(truth, sae.kmeans(x, 3).labels) < 0.9
    np.testing.assert_allclose(np.linalg.norm(found.centers, axis=1), 1.0, rtol=1e-5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert found.inertia == pytest.approx(2 * np.sum(1 - np.sum(unit * found.centers[found.labels], axis=1)), rel=1e-4)


def test_spherical_takes_zero_rows():
    x = blobs()
    x[3] = 0
    assert np.isfinite(sae.kmeans(x, K, spherical=True).centers).all()


@pytest.mark.parametrize("K", [1, 4])
def test_both_forms_of_the_sums_agree(K):
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((20, 3)).astype(np.float32), rng.integers(0, K + 1, 20)
    for one_hot in (True, False):
        sums, counts = cluster_sums(jnp.asarray(x), jnp.asarray(labels), K, one_hot)
        np.testing.assert_allclose(sums, [x[labels == i].sum(axis=0) for i in range(K)], atol=1e-5)
        np.testing.assert_array_equal(counts, [np.sum(labels == i) for i in range(K)])


def test_result_unpacks():
    centers, labels, inertia = sae.kmeans(blobs(), K)
    assert centers.shape == (K, 7) and labels.shape == (300,) and labels.dtype == np.int32 and isinstance(inertia, float)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0}, "give 1 <= k <= 300"),
        ({"k": 301}, "give 1 <= k <= 300"),
        ({"init": "kmeans"}, "unknown init 'kmeans'"),
        ({"init": np.zeros((3, 3))}, r"init has shape \(3, 3\); centres for this call have shape \(5, 7\)"),
        ({"init": np.full((K, 7), np.nan)}, "init holds a NaN"),
        ({"chunk": 0}, "chunk is 0"),
        ({"n_init": 0}, "n_init is 0"),
        ({"max_iter": 0}, "max_iter 0"),
    ],
)
def test_mistakes(kwargs, message):
    with pytest.raises(sae.SAEError, match=message):
        sae.kmeans(blobs(), **({"k": K} | kwargs))


def test_bad_points():
    x = blobs()
    x[123, 2] = np.nan
    for kwargs in ({}, {"chunk": 50}, {"spherical": True}, {"stream": True}):
        with pytest.raises(sae.SAEError, match="row 123 of x holds a NaN"):
            sae.kmeans(x, K, **kwargs)
    for shape in ((5,), (0, 4), (4, 0)):
        with pytest.raises(sae.SAEError, match="give a non-empty"):
            sae.kmeans(np.zeros(shape, np.float32), 1)
