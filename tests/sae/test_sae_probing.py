"""Probes: pooling against numpy, planted latents found, baselines by hand, no leakage, measures against scikit-learn."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.preprocessing import StandardScaler

import sae
import sae.pooling
from sae.probing import diff_mean_probe, fit_probe, measures, one_vs_rest, probe_problem, split, top_columns

D, F = 6, 20


def dictionary(architecture="relu", norm="none", seed=0, **fields):
    rng = np.random.default_rng(seed)
    k = 3 if architecture == "topk" else None
    cfg = sae.SAEConfig(architecture=architecture, d_in=D, d_sae=F, k=k, normalize_activations=norm, **fields)
    cfg = cfg.replace(input_scale=0.5) if norm == "expected_average_only_in" else cfg
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, cfg.out), "b_dec": (cfg.out,)}
    return sae.Dictionary({name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}, cfg)


def texts(n=40, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, n)
    return rng.standard_normal((lengths.sum(), D)).astype(np.float32) + 1, lengths.tolist()


@pytest.mark.parametrize("architecture", ["relu", "topk"])
@pytest.mark.parametrize(
    ("norm", "fields"),
    [
        ("none", {}),
        ("layer_norm", {}),
        ("expected_average_only_in", {}),
        ("layer_norm", {"undo_normalization": False}),
        ("constant_norm_rescale", {"undo_normalization": False}),
        ("expected_average_only_in", {"d_out": 4, "output_scale": 3.0}),
    ],
)
def test_pooling_is_a_mean_over_each_texts_tokens(monkeypatch, architecture, norm, fields):
    monkeypatch.setattr(sae.pooling, "BLOCK", 32)
    monkeypatch.setattr(sae.pooling, "MOST_TEXTS", 3)
    d, (x, lengths) = dictionary(architecture, norm, **fields), texts()
    z = np.asarray(sae.encode(d, x))
    ends = np.cumsum(lengths)
    expected = np.stack([z[end - n : end].mean(axis=0) for end, n in zip(ends, lengths)])
    for cut in ([x], np.split(x, [5, 6, 90])):
        found = sae.pooling.pool(d, cut, lengths)
        np.testing.assert_allclose(found.latents.toarray(), expected, atol=1e-5)
        np.testing.assert_allclose(found.activations, np.stack([x[e - n : e].mean(axis=0) for e, n in zip(ends, lengths)]), atol=1e-5)
    # Contributions are what the decoder adds: without some latents the mean reconstruction falls by exactly their part.
    off = np.arange(F) % 2 == 0
    part = np.asarray(sae.decode(d, z, x)) - np.asarray(sae.decode(d, np.where(off, 0, z), x))
    expected = np.stack([part[end - n : end].mean(axis=0) for end, n in zip(ends, lengths)])
    np.testing.assert_allclose(found.contributions.toarray()[:, off] @ np.asarray(d.params["W_dec"])[off], expected, atol=1e-4)


def test_pooling_of_single_tokens_encodes_no_more_than_they_are(monkeypatch):
    """Absorption pools so: a piece holds few texts, and is not filled up to what long texts take."""
    sizes, padded = [], sae.pooling.padded
    monkeypatch.setattr(sae.pooling, "padded", lambda rows, size: sizes.append(size) or padded(rows, size))
    d, x = dictionary(), texts()[0][:150]
    found = sae.pooling.pool(d, [x], [1] * 150)
    np.testing.assert_allclose(found.latents.toarray(), np.asarray(sae.encode(d, x)), atol=1e-5)
    assert sizes == [64, 64, 64]
    sizes.clear()
    sae.pooling.pool(d, [np.tile(x, (2, 1))], [300])
    assert sizes == [512]


def test_pooling_mistakes():
    d, (x, lengths) = dictionary(), texts()
    with pytest.raises(sae.SAEError, match="text 1 has no token"):
        sae.pooling.pool(d, [x], [3, 0])
    with pytest.raises(sae.SAEError, match="the lengths sum to"):
        sae.pooling.pool(d, [x], [*lengths, 2])
    with pytest.raises(sae.SAEError, match="NaN"):
        sae.pooling.pool(d, [x * np.nan], lengths)


def planted(n=400, classes=2, seed=0):
    """Pooled texts whose class c is told by latent 3 + c alone; in the raw activations it is spread over all dimensions, with noise."""
    import scipy.sparse

    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    latents = rng.exponential(1.0, (n, F)) * (rng.random((n, F)) < 0.3)
    latents[np.arange(n), 3 + labels] += 3 + rng.random(n)
    mixing = rng.standard_normal((F, D))
    sparse = scipy.sparse.csr_matrix(latents.astype(np.float32))
    return sae.pooling.Pooled(sparse, sparse, (latents @ mixing).astype(np.float32)), labels


def accuracy(found, method, k=None):
    (result,) = [r for r in found if r.method == method and r.k == k]
    return measures(result.problem.test_labels, result.scores)["accuracy"][0]


def test_a_planted_latent_is_found_and_beats_raw_dimensions():
    pooled, labels = planted()
    (problem,) = one_vs_rest(labels, *split(labels))
    found = list(probe_problem(pooled, problem, ks=(1, 2, 500)))
    assert {(r.method, r.k) for r in found} >= {("sae_top_k", 1), ("sae_top_k", 2), ("sae_top_k", F), ("llm_top_k", D), ("dense", None)}
    first = next(r for r in found if r.method == "sae_top_k")
    assert set(next(r for r in found if r.method == "sae_top_k" and r.k == 2).columns) == {3, 4} and first.columns[0] in (3, 4)
    assert accuracy(found, "sae_top_k", 2) > 0.97 > accuracy(found, "llm_top_k", 1)
    assert accuracy(found, "majority") == 0.5 < accuracy(found, "diff_mean") <= 1
    assert accuracy(found, "dense") == accuracy(found, "llm_top_k", D)


def test_classes_without_a_signal_give_half():
    pooled, labels = planted(2000)
    labels = np.random.default_rng(5).permutation(labels)
    (problem,) = one_vs_rest(labels, *split(labels))
    for result in probe_problem(pooled, problem, ks=(1, 5)):
        assert abs(measures(problem.test_labels, result.scores)["accuracy"][0] - 0.5) < 0.08, result.method


def test_a_problem_a_class_is_balanced():
    pooled, labels = planted(classes=3)
    names = np.array(["a", "b", "c"])[labels]
    train, test = split(names)
    problems = one_vs_rest(names, train, test)
    assert [p.name for p in problems] == ["a", "b", "c"]
    for problem in problems:
        assert problem.train_labels.mean() == 0.5 == problem.test_labels.mean()
        assert set(problem.train) <= set(train) and set(problem.test) <= set(test)
        np.testing.assert_array_equal(names[problem.test] == problem.name, problem.test_labels == 1)
        found = list(probe_problem(pooled, problem, ks=(1,)))
        assert next(r.columns[0] for r in found if r.method == "sae_top_k") == 3 + "abc".index(problem.name)


def test_the_test_rows_change_nothing_that_is_fitted():
    pooled, labels = planted()
    (problem,) = one_vs_rest(labels, *split(labels))
    spoiled = pooled._replace(latents=pooled.latents.tolil(), activations=pooled.activations.copy())
    spoiled.latents[problem.test] = 100.0
    spoiled.activations[problem.test] *= -7.0
    spoiled = spoiled._replace(latents=spoiled.latents.tocsr())
    one, other = (list(probe_problem(p, problem, ks=(2,))) for p in (pooled, spoiled))
    np.testing.assert_array_equal(one[0].columns, other[0].columns)
    dense = fit_probe(pooled.activations[problem.train], problem.train_labels)
    np.testing.assert_allclose(next(r for r in other if r.method == "dense").scores, dense.scores(spoiled.activations[problem.test]))


def test_no_text_is_on_both_sides_and_classes_are_shared_alike():
    labels, words = ["x"] * 80 + ["y"] * 20, [f"text {i % 40}" for i in range(80)] + [f"other {i}" for i in range(20)]
    train, test = split(labels, words, test_share=0.25)
    assert not {words[i] for i in train} & {words[i] for i in test} and len(train) + len(test) == 100
    assert sum(labels[i] == "y" for i in test) == 5 and sum(labels[i] == "x" for i in test) == 20
    assert split(labels, words, seed=1)[1].tolist() != test.tolist()
    assert len(split(labels, test_share=0.5)[1]) == 50
    for wrong, message in ((["x", "x"], "alike"), (["x", "x", "y"], "class 'y' has 1")):
        with pytest.raises(sae.SAEError, match=message):
            split(wrong)
    with pytest.raises(sae.SAEError, match="test_share is 1"):
        split(labels, test_share=1)


def test_the_probe_is_scikit_learns_on_standardised_columns():
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((200, 3)) * [1, 100, 0.01] + [0, 50, 3], rng.integers(0, 2, 200)
    x[:, 2] += 0.01 * labels
    scaler = StandardScaler().fit(x)
    theirs = LogisticRegression().fit(scaler.transform(x), labels)
    np.testing.assert_allclose(fit_probe(x, labels).scores(x), theirs.decision_function(scaler.transform(x)), atol=1e-6)
    tighter = fit_probe(x, labels, penalty=100.0)
    assert np.abs(tighter.weights).sum() < np.abs(fit_probe(x, labels).weights).sum()
    one_scale = (x - x.mean(axis=0)) / np.sqrt(np.mean(x.var(axis=0)))
    whole = LogisticRegression().fit(one_scale, labels).decision_function(one_scale)
    np.testing.assert_allclose(fit_probe(x, labels, per_column=False).scores(x), whole, atol=1e-6)
    constant = np.c_[x, np.full(200, 0.1)]
    np.testing.assert_allclose(fit_probe(constant, labels).scores(constant), fit_probe(x, labels).scores(x), atol=1e-6)


def test_diff_mean_by_hand():
    x = np.array([[0, 0], [0, 2], [4, 1], [4, 1]], np.float32)
    labels = np.array([0, 0, 1, 1])
    probe = diff_mean_probe(x, labels)
    assert probe.weights[1] == pytest.approx(0) and probe.weights[0] > 0  # means (0, 1) and (4, 1)
    assert -probe.bias / probe.weights[0] == pytest.approx(2.0)  # the threshold lies in the middle
    np.testing.assert_array_equal(top_columns(x, labels, 2), [0, 1])


def test_measures_against_scikit_learn():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 60), np.round(rng.standard_normal(60), 1)  # rounded: ties
    found = measures(labels, scores)
    assert found["accuracy"][0] == pytest.approx(accuracy_score(labels, scores > 0))
    assert found["f1"][0] == pytest.approx(f1_score(labels, scores > 0))
    assert found["auroc"][0] == pytest.approx(roc_auc_score(labels, scores))
    weights = rng.integers(0, 3, (5, 60))
    found = measures(labels, scores, weights)
    np.testing.assert_allclose(found["f1"], [f1_score(labels, scores > 0, sample_weight=w) for w in weights])
    np.testing.assert_allclose(found["auroc"], [roc_auc_score(labels, scores, sample_weight=w) for w in weights])
    one_class = measures(np.zeros(3), np.full(3, -1.0))
    assert one_class["accuracy"][0] == 1 and np.isnan(one_class["auroc"][0]) and np.isnan(one_class["f1"][0])
