"""The difficulty proxy, its baselines, its scale, and the label-free scores."""

import numpy as np
import pytest
from scipy import sparse

from jaxrl_llm.curation.difficulty import active_count, calibration_table, fit_difficulty, surprisal, unit_ranks, without_length
from jaxrl_llm.curation.probes import spearman
from jaxrl_llm.errors import UserError

N = 300


@pytest.fixture(scope="module")
def pool():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, 12)).astype(np.float32)
    fail = 1 / (1 + np.exp(-2 * (x[:, 0] + x[:, 1])))
    return {"sae": x, "length_tfidf": x[:, 1:]}, fail, rng.binomial(8, fail) / 8


def labels_on(rates, count, seed=0):
    labels = np.full(N, np.nan)
    rows = np.random.default_rng(seed).choice(N, count, replace=False)
    labels[rows] = rates[rows]
    return labels


def fit(designs, labels, **options):
    return fit_difficulty(designs, labels, **{"draws": 100, "models": ("ridge",), **options})


def test_pass_rates_of_a_subset_rank_the_rest_and_are_calibrated(pool):
    designs, fail, rates = pool
    result = fit(designs, labels_on(rates, 150), models=("elastic_net", "ridge"))
    assert spearman(result.values, fail) > 0.9
    assert ((result.values >= 0) & (result.values <= 1)).all() and np.abs(result.values - fail).mean() < 0.1
    report = result.report
    assert report["labels"] == {"count": 150, "used": 150, "held_out": 0, "lowest": 0.0, "highest": 1.0}
    assert set(report["probes"]) == {f"{d}/{m}" for d in designs for m in ("elastic_net", "ridge")}
    best, other = report["probes"][report["used"]], report["probes"][report["reference"]]
    assert report["used"].startswith("sae/") and report["reference"].startswith("length_tfidf/")
    assert best["low"] < best["value"] < best["high"] and best["value"] > other["value"]
    assert best["minus_reference"]["low"] > 0 and "held_out" not in best
    table = report["calibration"]
    assert sum(b["n"] for b in table) == 150 and max(abs(b["predicted"] - b["observed"]) for b in table) < 0.25


def test_label_limit_leaves_a_held_out_check(pool):
    designs, fail, rates = pool
    report = fit(designs, rates, max_labels=100).report
    assert report["labels"]["used"] == 100 and report["labels"]["held_out"] == 200
    probe = report["probes"]["sae/ridge"]
    assert probe["n"] == 100 and probe["held_out"] == pytest.approx(probe["value"], abs=0.12)


def test_labels_of_another_scale(pool):
    designs, fail, _ = pool
    levels = np.digitize(fail, [0.2, 0.4, 0.6, 0.8]) + 1.0
    result = fit(designs, levels)
    assert result.report["labels"]["lowest"] == 1 and result.report["labels"]["highest"] == 5
    assert spearman(result.values, levels) > 0.85 and result.values.max() <= 1
    taken = fit(designs, np.where(np.arange(N) < 200, levels, np.nan), use="labels")
    assert taken.report["used"] == "labels"
    np.testing.assert_allclose(taken.values[:200], (levels[:200] - 1) / 4)
    assert spearman(taken.values[200:], levels[200:]) > 0.8


def test_use_folds_seed_and_free_scores(pool):
    designs, fail, rates = pool
    labels = labels_on(rates, 120)
    base = fit(designs, labels, free_scores={"oracle": fail, "noise": np.random.default_rng(1).random(N)})
    assert base.report["probes"]["oracle"]["value"] > base.report["probes"]["sae/ridge"]["value"]
    assert base.report["probes"]["noise"]["minus_reference"]["high"] < 0
    other = fit(designs, labels, use="length_tfidf")
    assert other.report["used"] == "length_tfidf/ridge" and spearman(other.values, fail) < spearman(base.values, fail)
    assert fit(designs, labels, folds=2).report["probes"] != base.report["probes"]
    assert fit(designs, labels, seed=3).report["probes"]["sae/ridge"] != base.report["probes"]["sae/ridge"]
    ticks = []
    fit(designs, labels, tick=lambda: ticks.append(1))
    assert len(ticks) == 2 * 6


def test_too_few_labels_and_unknown_names(pool):
    designs, _, rates = pool
    with pytest.raises(UserError, match="0 labels"):
        fit(designs, np.full(N, np.nan))
    with pytest.raises(UserError, match="1 different"):
        fit(designs, np.full(N, 0.5))
    with pytest.raises(UserError, match="no features 'sea'"):
        fit(designs, rates, use="sea")


def test_surprisal_is_the_negative_log_probability_under_independent_features():
    dense = (np.random.default_rng(0).random((40, 6)) < [0.9, 0.5, 0.1, 0.3, 0.02, 0.5]).astype(float)
    dense[dense > 0] *= 3.0
    active = dense > 0
    p = (active.sum(0) + 0.5) / 41
    expected = -(active * np.log(p) + (~active) * np.log1p(-p)).sum(1)
    matrix = sparse.csr_matrix(dense)

    def blocks():
        yield matrix[:15]
        yield matrix[15:]

    np.testing.assert_allclose(surprisal(blocks, 6), expected)
    assert active_count(blocks).tolist() == active.sum(1).tolist()
    lengths = np.arange(1, 41)
    for score in (surprisal(blocks, 6, lengths), active_count(blocks, lengths)):
        assert abs(np.corrcoef(score, np.log(lengths))[0, 1]) < 1e-9
    np.testing.assert_allclose(without_length(expected + 5 * np.log(lengths), lengths), without_length(expected, lengths), atol=1e-9)


def test_unit_ranks_and_calibration_table():
    assert unit_ranks(np.array([3.0, 1.0, 3.0, 9.0])).tolist() == [0.5, 0.125, 0.5, 0.875]
    table = calibration_table(np.array([0.1, 0.9, 0.2, 0.8]), np.array([0.0, 1.0, 0.5, 1.0]), bins=2)
    assert [b["n"] for b in table] == [2, 2]
    assert table[0]["predicted"] == pytest.approx(0.15) and table[0]["observed"] == 0.25
