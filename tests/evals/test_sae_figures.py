"""Intervals of a dictionary's figures: coverage by a bootstrap over texts, and what the tables of probes hold."""

import numpy as np
import pytest

from jaxrl_llm.evals import sae_figures
from jaxrl_llm.evals import statistics as st
from sae.absorption import LetterAbsorption
from sae.probing import ProbeScores, Problem


def test_an_interval_of_a_ratio_covers_its_truth_and_knows_that_texts_differ():
    """Texts of different means and lengths: over tokens as if they were independent the interval would be far too narrow."""
    rng, covered, widths = np.random.default_rng(0), 0, []
    for trial in range(100):
        tokens = rng.integers(20, 200, 80).astype(float)
        sums = {"tokens": tokens, "l0": tokens * (10 + 2 * rng.standard_normal(80))}
        found = st.bootstrap_sums(sums, lambda totals: {"l0": totals["l0"] / totals["tokens"]}, draws=300, seed=trial)["l0"]
        covered += found.low <= 10 <= found.high
        widths.append(found.high - found.low)
    assert 88 <= covered <= 100 and 0.5 < np.mean(widths) < 1.5
    assert found.estimate == pytest.approx(sums["l0"].sum() / tokens.sum())


def test_very_many_texts_are_pooled_with_their_neighbours():
    sums = {"a": np.arange(10.0), "b": np.ones(10)}
    assert st.pooled_sums(sums, most=4)["a"].tolist() == [1, 9, 11, 24] and st.pooled_sums(sums, most=4)["b"].sum() == 10
    assert st.pooled_sums(sums, most=20)["a"].tolist() == list(range(10))


def test_intervals_without_a_sample_have_no_limits():
    alone = st.bootstrap_sums({"x": np.array([3.0])}, lambda totals: {"x": totals["x"]})["x"]
    assert alone.estimate == 3.0 and np.isnan(alone.low) and sae_figures.estimate(alone) == {"value": 3.0, "low": None, "high": None}
    draws = np.array([1.0, np.nan, 2.0, np.inf])
    assert st.percentile_interval(1.5, draws, 50).high <= 2.0
    assert np.isnan(st.percentile_interval(1.5, np.full(3, np.nan), 50).low)
    weights = st.resamples(7, 5, 0)
    assert weights.shape == (5, 7) and np.all(weights.sum(axis=1) == 7) and not np.array_equal(weights, st.resamples(7, 5, 1))


def test_probe_figures_are_means_over_classes_with_texts_drawn_anew():
    rng = np.random.default_rng(0)
    test = np.arange(100, 300)
    labels = rng.integers(0, 2, 200)
    easy = Problem("easy", np.array([0]), np.array([1]), test, labels)
    hard = Problem("hard", np.array([0]), np.array([1]), test[:100], labels[:100])
    results = [ProbeScores("m", 3, easy, np.where(labels == 1, 1.0, -1.0), np.array([5])), ProbeScores("m", 3, hard, np.ones(100), np.array([6]))]
    (row,) = sae_figures.probe_figures(results, test, draws=400, seed=0)
    share = labels[:100].mean()
    assert row["classes"] == {"easy": 1.0, "hard": pytest.approx(share)} and row["columns"] == {"easy": [5], "hard": [6]}
    assert row["accuracy"]["value"] == pytest.approx((1 + share) / 2) and row["auroc"]["value"] == pytest.approx(0.75)
    half = 1.96 * np.sqrt(share * (1 - share) / 100) / 2  # only the second class's accuracy varies
    assert row["accuracy"]["high"] - row["accuracy"]["low"] == pytest.approx(2 * half, rel=0.25)


def test_absorption_draws_words_and_leaves_letters_without_rows_out():
    tokens = np.repeat(np.arange(10), 3)
    full = np.repeat(np.arange(10) < 4, 3)
    some = LetterAbsorption("a", [3], 0.9, [0.8], np.arange(30), full.astype(float), full, np.where(full, 7, -1))
    none = LetterAbsorption("z", [1, 2], 0.0, [0.0], np.arange(0), np.zeros(0), np.zeros(0, bool), np.zeros(0, int))
    found = sae_figures.absorption_table([some, none], tokens, draws=500, seed=0)
    figures = found["figures"]
    assert figures["mean_full_absorption_score"]["value"] == pytest.approx(0.4) and figures["mean_num_split_features"]["value"] == 1.5
    width = figures["mean_full_absorption_score"]["high"] - figures["mean_full_absorption_score"]["low"]
    assert width == pytest.approx(2 * 2.26 * np.sqrt(0.24 / 10), rel=0.3)  # ten words, not thirty rows
    assert found["letters"][0]["absorbers"] == [7] and found["letters"][1]["full"] is None


def test_density_histogram_counts_every_latent_once():
    found = sae_figures.density_histogram(np.array([0.0, 1e-9, 0.01, 0.01, 1.0]))
    assert found["dead"] == 1 and sum(found["counts"]) == 4 and found["latents"] == 5
    assert found["counts"][0] == 1 == found["counts"][-1] and len(found["log10_edges"]) == len(found["counts"]) + 1
