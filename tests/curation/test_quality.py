"""Quality: corruptions, the probes that find them, labels, and the filter."""

import numpy as np
import pytest

from jaxrl_llm.curation.corruptions import CORRUPTIONS, corrupt_rows
from jaxrl_llm.curation.diversity import cluster_kept
from jaxrl_llm.curation.quality import answer_length_columns, difficulty_strata, filter_rows, fit_labelled_quality, fit_quality
from jaxrl_llm.errors import UserError

PROMPTS = [f"Anna has {i} red apples, and Tom gave her {2 * i + 1} more. How many apples are there in all?" for i in range(12)]
ROWS = [{"id": str(i), "prompt": p, "answer": f"{i} + {2 * i + 1} = {3 * i + 1}\n#### {3 * i + 1}"} for i, p in enumerate(PROMPTS)]


@pytest.mark.parametrize("kind", sorted(CORRUPTIONS))
def test_each_corruption_changes_its_field_only_and_says_when_it_cannot(kind):
    rng = np.random.default_rng(0)
    field = "answer" if kind in ("wrong_answer", "changed_number") else "prompt"
    for row, donor in zip(ROWS, ROWS[1:] + ROWS[:1]):
        change = CORRUPTIONS[kind](rng, row, donor)
        assert set(change) == {field} and change[field] != row[field] and change[field].strip()
    bare = {"id": "x", "prompt": "why", "answer": None}
    assert CORRUPTIONS[kind](rng, bare, bare) is None


def test_what_corruptions_do():
    rng, row, donor = np.random.default_rng(1), ROWS[3], ROWS[5]
    assert CORRUPTIONS["wrong_answer"](rng, row, donor)["answer"] == donor["answer"]
    assert sorted(CORRUPTIONS["garble"](rng, row, donor)["prompt"].replace(" ", "")) == sorted(row["prompt"].replace(" ", ""))
    fewer = CORRUPTIONS["drop_number"](rng, row, donor)["prompt"]
    assert (("3" in fewer) or ("7" in fewer)) and not ("3" in fewer and "7" in fewer)
    assert len(CORRUPTIONS["drop_clause"](rng, row, donor)["prompt"]) < len(row["prompt"]) - 10
    assert row["prompt"].startswith(CORRUPTIONS["truncate"](rng, row, donor)["prompt"])
    spaced = {"prompt": "add 4 7 and 8 =", "answer": "5 5"}
    assert CORRUPTIONS["drop_clause"](rng, spaced, donor)["prompt"] != spaced["prompt"]
    assert CORRUPTIONS["changed_number"](rng, spaced, donor)["answer"].split() != ["5", "5"]
    assert CORRUPTIONS["wrong_answer"](rng, row, row) is None, "the same answer is not a wrong one"


def test_corrupt_rows_deals_kinds_evenly_and_reproducibly():
    copies, sources, kinds = corrupt_rows(ROWS, np.arange(12), list(CORRUPTIONS), seed=0)
    assert sorted(sources) == list(range(12)) and sorted(kinds) == sorted([*CORRUPTIONS] * 2)
    assert all(c["id"] == ROWS[s]["id"] for c, s in zip(copies, sources))
    assert copies == corrupt_rows(ROWS, np.arange(12), list(CORRUPTIONS), seed=0)[0]
    assert copies != corrupt_rows(ROWS, np.arange(12), list(CORRUPTIONS), seed=1)[0]
    silent = [{**r, "answer": ""} for r in ROWS]
    assert set(corrupt_rows(silent, np.arange(12), ["wrong_answer", "garble"])[2]) == {"garble"}
    with pytest.raises(UserError, match="no corruption 'typo'"):
        corrupt_rows(ROWS, [0], ["typo"])


@pytest.fixture(scope="module")
def world():
    """Features in which garbled copies shift column 0, wrong answers column 1; the baseline sees neither well."""
    rng = np.random.default_rng(0)
    n, m = 400, 200
    sources = rng.permutation(n)[:m]
    kinds = np.where(np.arange(m) % 2 == 0, "garble", "wrong_answer")
    rows = rng.standard_normal((n, 6)).astype(np.float32)
    copies = rows[sources] + 0.3 * rng.standard_normal((m, 6)).astype(np.float32)
    copies[kinds == "garble", 0] += 3
    copies[kinds == "wrong_answer", 1] += 1.5
    noise = (rng.standard_normal((n, 3)), rng.standard_normal((m, 3)))
    return rows, copies, sources, kinds, noise


def fit(world, **options):
    rows, copies, sources, kinds, noise = world
    free = {"logp": (-rows[:, 1], -copies[:, 1])}
    return fit_quality({"sae": (rows, copies), "length_tfidf": noise}, sources, kinds, free_scores=free, **{"draws": 100, **options})


def test_self_supervised_probe_scores_each_kind(world):
    result = fit(world)
    probes = result.report["probes"]
    assert probes["sae"]["value"] > 0.8 > probes["logp"]["value"] > 0.55
    assert probes["sae"]["by_kind"]["garble"]["value"] > 0.9 and probes["sae"]["by_kind"]["garble"]["n"] == 100
    assert probes["logp"]["by_kind"]["wrong_answer"]["value"] > 0.7 > probes["logp"]["by_kind"]["garble"]["value"]
    assert 0.35 < probes["length_tfidf"]["value"] < 0.6 and probes["sae"]["minus_reference"]["low"] > 0.2
    assert result.report["counts"] == {"rows": 200, "copies": 200}


def test_values_find_rows_that_are_bad_already(world):
    rows, copies, sources, kinds, noise = world
    spoilt = rows.copy()
    bad = np.setdiff1d(np.arange(400), sources)[:30]
    spoilt[bad, 0] += 4
    values = fit((spoilt, copies, sources, kinds, noise)).values
    assert np.isin(bad, np.argsort(values)[:60]).mean() > 0.8
    assert (fit(world, use="logp").values == -rows[:, 1]).all()
    assert not np.allclose(fit(world, use="length_tfidf").values, fit(world).values)


def test_training_rows_get_out_of_fold_scores():
    """With features that identify rows, an in-sample score would call every training row good."""
    rng = np.random.default_rng(0)
    rows, copies = rng.standard_normal((80, 200)).astype(np.float32), rng.standard_normal((80, 200)).astype(np.float32)
    result = fit_quality({"sae": (rows, copies)}, np.arange(80), np.full(80, "garble"), draws=10)
    assert result.report["probes"]["sae"]["value"] < 0.7
    assert (result.values > 0).mean() < 0.8


def test_labelled_quality_binary_and_graded():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 5)).astype(np.float32)
    graded = np.round(3 + x[:, 0] + 0.3 * rng.standard_normal(200))
    labels = np.where(np.arange(200) < 120, graded, np.nan)
    result = fit_labelled_quality({"sae": x, "length_tfidf": x[:, 2:]}, labels, draws=50)
    assert result.report["measure"] == "spearman" and result.report["probes"]["sae"]["value"] > 0.8
    assert np.corrcoef(result.values[120:], x[120:, 0])[0, 1] > 0.9
    binary = fit_labelled_quality({"sae": x}, np.where(np.isfinite(labels), labels > 3, np.nan), draws=50)
    assert binary.report["measure"] == "auroc" and binary.report["probes"]["sae"]["value"] > 0.9
    with pytest.raises(UserError, match="good rows and bad"):
        fit_labelled_quality({"sae": x}, np.full(200, 1.0))
    with pytest.raises(UserError, match="no features"):
        fit_labelled_quality({"dense": x}, labels)


def test_filter_counts_each_row_once():
    quality = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    faults = {"duplicate": np.arange(8) == 0, "empty answer": np.arange(8) < 2}
    kept = filter_rows(quality, 1 / 3, faults)
    assert kept.reasons == {"duplicate": 1, "empty answer": 1, "low_quality": 2}
    assert np.flatnonzero(kept.keep).tolist() == [4, 5, 6, 7] and kept.cut == pytest.approx(0.4)
    assert filter_rows(quality, 0.0).keep.all() and filter_rows(quality, 0.0).cut is None
    assert np.flatnonzero(~filter_rows(np.zeros(4), 0.5).keep).tolist() == [2, 3], "of equals the later ones go"
    with pytest.raises(UserError, match="no row is left: 8 duplicate"):
        filter_rows(quality, 0.0, {"duplicate": np.ones(8, bool)})
    with pytest.raises(UserError, match="drop_fraction is 1"):
        filter_rows(quality, 1.0)
    with pytest.raises(UserError, match="no features 'sea'"):
        fit_quality({}, np.array([0]), np.array(["x"]), use="sea")


def test_rows_compete_inside_their_stratum():
    quality = np.array([0.1, 0.2, 0.3, 0.4, 5.0, 6.0, 7.0, 8.0])
    strata = np.array([3, 3, 3, 3, 9, 9, 9, 9])
    assert np.flatnonzero(~filter_rows(quality, 0.5).keep).tolist() == [0, 1, 2, 3]
    inside = filter_rows(quality, 0.5, strata=strata)
    assert np.flatnonzero(~inside.keep).tolist() == [0, 1, 4, 5] and inside.cut is None
    np.testing.assert_allclose(inside.margin, [-0.15, -0.05, 0.05, 0.15, -1.5, -0.5, 0.5, 1.5])
    assert ((inside.margin >= 0) == inside.keep).all()


def test_a_stratum_loses_what_it_is_expected_to_hold_of_bad_rows():
    """Two strata of 10 rows, a quarter and three quarters of them bad: of 8 rows to drop, 2 and 6 go; where shares above 1 would
    come out, the whole stratum goes and the rest is taken elsewhere."""
    quality, strata = np.arange(20.0), np.repeat([0, 1], 10)
    filtered = filter_rows(quality, 0.4, strata=strata, expected_bad=np.repeat([0.25, 0.75], 10))
    assert np.flatnonzero(~filtered.keep).tolist() == [0, 1, 10, 11, 12, 13, 14, 15]
    most = filter_rows(quality, 0.7, strata=strata, expected_bad=np.repeat([0.1, 0.9], 10))
    assert (~most.keep[:10]).sum() == 4 and not most.keep[10:].any()


@pytest.mark.parametrize("drop", [0.0, 0.13, 0.5, 0.97])
def test_shares_add_up_whatever_the_strata(drop):
    rng = np.random.default_rng(0)
    quality, strata, bad = rng.standard_normal(301), rng.integers(0, 40, 301), rng.random(301) ** 4
    for expected in (None, bad):
        assert (~filter_rows(quality, drop, strata=strata, expected_bad=expected).keep).sum() == round(drop * 301)


def test_strata_are_equal_parts_of_a_cluster_by_difficulty():
    cluster, difficulty = np.array([7, 7, 7, 7, 2, 2]), np.array([0.9, 0.1, 0.5, 0.2, 0.3, 0.1])
    assert difficulty_strata(cluster, difficulty, 2).tolist() == [3, 2, 3, 2, 1, 0]
    assert difficulty_strata(cluster, difficulty, 1).tolist() == [1, 1, 1, 1, 0, 0]


def test_dropped_rows_make_no_cluster_of_their_own():
    rng = np.random.default_rng(0)
    centres = np.eye(3)
    vectors = np.concatenate([c + 0.05 * rng.standard_normal((20, 3)) for c in centres]).astype(np.float32)
    keep = np.arange(60) < 40  # the third group is dropped
    labels = cluster_kept(vectors, keep, 2)
    assert len(set(labels[:20])) == len(set(labels[20:40])) == 1 and labels[0] != labels[20]
    assert set(labels) == {0, 1}


def test_columns():
    columns = answer_length_columns(["1 2", None, ""])
    np.testing.assert_allclose(columns, np.log1p([[3, 2], [0, 0], [0, 0]]), rtol=1e-6)
