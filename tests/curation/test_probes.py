"""Probes: their fits, folds, measures, intervals and calibration."""

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score

from jaxrl_llm.curation import probes
from jaxrl_llm.curation.probes import (
    ArrayDesign,
    JoinedDesign,
    StackedDesign,
    as_design,
    auroc,
    calibrate,
    compare,
    cross_validate,
    fit_probe,
    fold_numbers,
    spearman,
)
from jaxrl_llm.errors import UserError


def data(n=200, d=10, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)).astype(np.float32)
    y = x[:, 0] - 0.5 * x[:, 1] + noise * rng.standard_normal(n)
    return x, y


def test_measures_equal_scipy_and_sklearn():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 60).astype(float), rng.standard_normal(60)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert spearman(np.ones(5), b[:5]) == 0.0
    positive = rng.random(60) < 0.4
    assert auroc(a, positive) == pytest.approx(roc_auc_score(positive, a))
    assert auroc(a, np.ones(60, bool)) == 0.5


@pytest.mark.parametrize("as_sparse", [False, True])
def test_ridge_is_ridge_on_standardised_columns(as_sparse):
    x, y = data()
    x = x * np.arange(1, 11) + 3
    probe = fit_probe(sparse.csr_matrix(x) if as_sparse else x, y, "ridge")
    standard = (x - x.mean(0)) / x.std(0)
    reference = Ridge(alpha=probe.penalty).fit(standard, y)
    np.testing.assert_allclose(probe.predict(ArrayDesign(x)), reference.predict(standard), atol=1e-3)


def test_elastic_net_is_sparse_and_logistic_is_logistic():
    x, y = data(d=40, noise=1.0)
    net = fit_probe(x, y, "elastic_net")
    assert 2 <= (net.weights != 0).sum() < 40 and np.abs(net.weights).argmax() == 0
    less = fit_probe(x, y, "elastic_net", l1_ratio=0.05)
    assert (less.weights != 0).sum() > (net.weights != 0).sum()
    label = (y > 0).astype(float)
    probe = fit_probe(x, label, "logistic")
    standard = (x - x.mean(0)) / x.std(0)
    reference = LogisticRegression(C=probe.penalty, tol=1e-6).fit(standard, label)
    assert spearman(probe.predict(ArrayDesign(x)), reference.decision_function(standard)) > 0.999


def test_column_limit_constant_targets_and_unknown_models():
    x, y = data()
    x[:, 3] *= 10
    x[:, 7] = 2.0
    assert 7 not in fit_probe(x, y, "ridge").columns, "a constant column is of no use"
    assert fit_probe(x, y, "ridge", max_columns=1).columns.tolist() == [3]
    flat = fit_probe(x, np.full(200, 0.25), "ridge")
    assert np.allclose(flat.predict(ArrayDesign(x)), 0.25)
    with pytest.raises(UserError, match="no model 'svm'"):
        fit_probe(x, y, "svm")


@pytest.mark.parametrize("model", ["ridge", "elastic_net", "logistic"])
def test_rounding_is_not_amplified_by_a_column_that_hardly_varies(model):
    """The entropy of a policy that knows nothing: 4.4 to within a few ten-thousandths, of which float32 keeps three digits."""
    x, y = data(d=4)
    x[:, 3] = 4.4 + 4e-4 * x[:, 3]
    y = (y > 0).astype(float) if model == "logistic" else y
    rounded = x * (1 + 1e-7 * np.random.default_rng(1).standard_normal(x.shape)).astype(np.float32)
    one, other = fit_probe(x, y, model), fit_probe(rounded, y, model)
    assert one.columns.tolist() == [0, 1, 2]
    np.testing.assert_allclose(other.predict(as_design(rounded)), one.predict(as_design(x)), atol=1e-4)
    x[:, 3] = 4.4 + 4e-3 * (x[:, 3] - 4.4) / 4e-4
    assert fit_probe(x, y, "ridge").columns.tolist() == [0, 1, 2, 3]


def test_folds_keep_groups_together_and_are_even():
    groups = np.repeat(np.arange(25), 4)
    fold = fold_numbers(groups, 5, seed=0)
    assert all(len(set(fold[groups == g])) == 1 for g in range(25))
    assert np.bincount(fold).tolist() == [20] * 5
    assert fold_numbers(groups, 5, seed=1).tolist() != fold.tolist()


def test_out_of_fold_scores_do_not_see_their_own_labels():
    """On pure noise with more columns than rows an in-sample fit is perfect and an honest one worthless."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((120, 300)).astype(np.float32), rng.standard_normal(120)
    oof, probe = cross_validate(ArrayDesign(x), np.arange(120), y, "ridge")
    assert abs(spearman(oof, y)) < 0.25 < spearman(probe.predict(ArrayDesign(x)), y)
    twice = np.repeat(np.arange(60), 2)  # each row is there twice: only groups keep the copy out of the training folds
    leak, _ = cross_validate(ArrayDesign(x[twice]), np.arange(120), y[twice], "ridge")
    honest, _ = cross_validate(ArrayDesign(x[twice]), np.arange(120), y[twice], "ridge", groups=twice)
    assert spearman(leak, y[twice]) > 0.5 > spearman(honest, y[twice]) + 0.2


def test_cross_validation_finds_signal_counts_fits_and_uses_the_rows_given():
    x, y = data()
    ticks = []
    rows = np.arange(50, 200)
    oof, probe = cross_validate(ArrayDesign(x), rows, y[rows], "ridge", folds=4, tick=lambda: ticks.append(1))
    assert spearman(oof, y[rows]) > 0.8 and len(ticks) == 5
    assert spearman(probe.predict(ArrayDesign(x), np.arange(50)), y[:50]) > 0.8
    with pytest.raises(UserError, match="two labelled rows"):
        cross_validate(ArrayDesign(x), np.array([3]), y[:1], "ridge")


def test_designs(monkeypatch):
    x, _ = data(n=30)
    pick = np.array([4, 4, 29, 0])
    for design in (as_design(x), as_design(sparse.csr_matrix(x)), as_design(ArrayDesign(x))):
        got = design.rows(pick)
        np.testing.assert_array_equal(got.toarray() if sparse.issparse(got) else got, x[pick])
    assert as_design(x[:, 0]).rows(pick).shape == (4, 1)
    joined = JoinedDesign(as_design(x), as_design(sparse.csr_matrix(x[:, :2])))
    np.testing.assert_array_equal(joined.rows(pick), np.concatenate([x, x[:, :2]], axis=1)[pick])
    stacked = StackedDesign(as_design(x), as_design(x + 1))
    np.testing.assert_array_equal(stacked.rows(np.array([31, 2, 59, 0])), np.concatenate([x, x + 1])[[31, 2, 59, 0]])
    assert len(stacked) == 60 and len(joined) == 30
    monkeypatch.setattr(probes, "CHUNK_ROWS", 7)
    probe = fit_probe(x, x[:, 0], "ridge")
    np.testing.assert_allclose(probe.predict(as_design(x)), x[:, probe.columns] @ probe.weights + probe.intercept, atol=1e-5)


def test_a_narrow_side_of_a_join_is_not_drowned():
    rng = np.random.default_rng(0)
    wide, narrow = rng.standard_normal((150, 400)), rng.standard_normal((150, 2))
    y = (narrow[:, 0] + 0.5 * rng.standard_normal(150) > 0).astype(float)
    joined = JoinedDesign(as_design(wide), as_design(narrow))
    np.testing.assert_allclose([np.square(joined.scales[:400]).sum(), np.square(joined.scales[400:]).sum()], 201)
    nested = JoinedDesign(joined, as_design(narrow)).scales
    np.testing.assert_allclose([np.square(nested[:402]).sum(), np.square(nested[402:]).sum()], 202)
    np.testing.assert_allclose(StackedDesign(joined, joined).scales, joined.scales)
    equal, _ = cross_validate(joined, np.arange(150), y, "logistic")
    drowned, _ = cross_validate(ArrayDesign(joined.rows(np.arange(150))), np.arange(150), y, "logistic")
    assert auroc(equal, y) > auroc(drowned, y) + 0.05
    probe = fit_probe(joined.rows(np.arange(150)), y, "ridge", scales=joined.scales)
    assert np.abs(probe.weights[400]) > 3 * np.abs(probe.weights[:400]).max()


def test_intervals_cover_and_differences_are_paired():
    rng = np.random.default_rng(0)
    truth = rng.standard_normal(300)
    scores = {"good": truth + rng.standard_normal(300), "same": None, "bad": rng.standard_normal(300)}
    scores["same"] = scores["good"] * 2
    table = compare(scores, truth, spearman, reference="good", draws=300)
    good = table["good"]
    assert good["low"] < good["value"] < good["high"] and 0.05 < good["high"] - good["low"] < 0.25 and good["n"] == 300
    assert "minus_reference" not in good
    assert table["same"]["minus_reference"] == {"value": 0.0, "low": 0.0, "high": 0.0}, "the same resamples for all"
    assert table["bad"]["minus_reference"]["high"] < 0
    assert "minus_reference" not in compare(scores, truth, spearman, draws=10)["bad"]
    wide = compare({"good": np.repeat(scores["good"][:30], 10)}, np.repeat(truth[:30], 10), spearman, groups=np.repeat(np.arange(30), 10))
    naive = compare({"good": np.repeat(scores["good"][:30], 10)}, np.repeat(truth[:30], 10), spearman)
    assert wide["good"]["high"] - wide["good"]["low"] > 2 * (naive["good"]["high"] - naive["good"]["low"])


def test_calibration_keeps_order_and_matches_rates():
    rng = np.random.default_rng(0)
    score = rng.standard_normal(3000) * 7 + 100
    rate = 1 / (1 + np.exp(-(score - 103) / 5))
    to_unit = calibrate(score, rng.binomial(8, rate) / 8)
    fitted = to_unit(score)
    assert np.abs(fitted - rate).mean() < 0.02 and spearman(fitted, score) == pytest.approx(1)
    against = calibrate(score, 1 - rate)(score)
    assert np.ptp(against) == 0 and against[0] == pytest.approx((1 - rate).mean(), abs=1e-6)
    separable = calibrate(np.array([-1.0, 1.0]), np.array([0.0, 1.0]))(np.array([-1.0, 1.0]))
    assert 0 < separable[0] < 0.2 < 0.8 < separable[1] < 1
    assert calibrate(np.zeros(4), np.array([0.0, 1, 1, 1]))(np.zeros(4))[0] == pytest.approx(0.75, abs=1e-3)
