"""The figures of `jaxrl-llm eval` for dictionaries, each with its 95% interval, as JSON values: {"value", "low", "high"}.

Tokens of one text are alike, so that texts are what is drawn anew: documents for what is measured on a stream, test texts for probes,
test words for absorption.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from jaxrl_llm.evals.statistics import Interval, bootstrap_sums, percentile_interval, resamples, tails
from sae.absorption import LetterAbsorption, absorption_figures
from sae.metrics import Statistics, density_figures
from sae.perturbation import Perturbation
from sae.probing import ProbeScores, measures
from sae.splice import recovered

HISTOGRAM = np.linspace(-6.0, 0.0, 49)  # log10 of the share of tokens
LATENTS = 2048  # whose resampled densities are held at once


def estimate(found: Interval) -> dict[str, float | None]:
    """An interval as JSON; limits that there are none of are None."""
    value, low, high = (float(v) if np.isfinite(v) else None for v in (found.estimate, found.low, found.high))
    return {"value": value, "low": low, "high": high}


def core_figures(found: Statistics, *, draws: int, seed: int) -> tuple[dict[str, dict], Float[np.ndarray, "2 F"]]:
    """(sparsity, reconstruction and the shares of dead and dense latents, with intervals over documents; the limits of each latent's density)."""
    figures = {name: estimate(one) for name, one in bootstrap_sums(found.documents, found.of_sums, draws=draws, seed=seed).items()}
    shares, limits = density_intervals(found, draws=draws, seed=seed)
    return figures | {name: estimate(one) for name, one in shares.items()}, limits


def density_intervals(found: Statistics, *, draws: int, seed: int) -> tuple[dict[str, Interval], Float[np.ndarray, "2 F"]]:
    """`sae.metrics.density_figures` with 95% limits, and those of each latent's density (NaN of one that never fires).

    A bootstrap over the groups of documents whose firings were counted apart. Not of the dead share: a resample holds fewer different
    documents than the set does, and so more latents that fire in none of them. Its variance is the jackknife's over the groups, which on
    average is no less than the true one (Efron and Stein 1981, of any symmetric function); limits by Student's t, within [0, 1].
    """
    units, values = len(found.fired_UF), density_figures(found.density_F)
    if units < 2:
        nowhere = np.full((2, found.fired_UF.shape[1]), np.nan)
        return {name: Interval(value, float("nan"), float("nan")) for name, value in values.items()}, nowhere
    weights = resamples(units, draws, seed)
    tokens = weights @ found.group_tokens_U
    weights, fired_F = weights.astype(np.float32), found.fired_F
    sums = {percent: np.zeros((2, draws)) for percent in (1, 10)}  # of the latents above it: their number, their densities
    total, limits = np.zeros(draws), np.zeros((2, len(fired_F)))
    for start in range(0, len(fired_F), LATENTS):
        part = slice(start, start + LATENTS)
        density = weights @ found.fired_UF[:, part].astype(np.float32) / np.maximum(tokens, 1)[:, None]
        total += density.sum(axis=1)
        for percent, sum_of in sums.items():
            over = density > percent / 100
            sum_of += over.sum(axis=1), np.where(over, density, 0.0).sum(axis=1)
        limits[:, part] = np.quantile(density, tails(units), axis=0)
    limits[:, fired_F == 0] = np.nan
    intervals = {"dead_share": jackknife_share(found.fired_UF, fired_F)}
    for percent, (number, density) in sums.items():
        drawn = {"": number / len(fired_F), "normalized_": density / np.where(total > 0, total, np.nan)}
        for before, share in drawn.items():
            name = f"{before}freq_over_{percent}_percent"
            intervals[name] = percentile_interval(values[name], share, units)
    return {name: intervals[name] for name in values}, limits


def jackknife_share(fired_UF: Int[np.ndarray, "U F"], fired_F: Int[np.ndarray, "F"]) -> Interval:
    """The share of latents that fire nowhere, with limits from what it would be without each of the groups."""
    units, dead = len(fired_UF), float(np.mean(fired_F == 0))
    without = np.array([np.mean(fired_F == own) for own in fired_UF])  # those that fire nowhere, and those that fire in this group alone
    error = np.sqrt((units - 1) / units * np.sum((without - without.mean()) ** 2)) * stats.t.ppf(0.975, units - 1)
    return Interval(dead, max(dead - error, 0.0), min(dead + error, 1.0))


def model_figures(sums: Mapping[str, np.ndarray], *, draws: int, seed: int) -> dict[str, dict]:
    """Cross-entropies, divergences and the recovered shares, of `sae.splice_sums`."""
    return {name: estimate(one) for name, one in bootstrap_sums(sums, recovered, draws=draws, seed=seed).items()}


def density_histogram(density_F: np.ndarray) -> dict[str, Any]:
    """Latents by log10 of the share of tokens they fire on; those that never do are counted apart, rarer ones are in the first bin."""
    alive = np.log10(density_F[density_F > 0])
    counts = np.histogram(np.clip(alive, HISTOGRAM[0], HISTOGRAM[-1]), HISTOGRAM)[0]
    return {"log10_edges": HISTOGRAM.tolist(), "counts": counts.tolist(), "dead": int(np.sum(density_F == 0)), "latents": len(density_F)}


def probe_figures(results: Iterable[ProbeScores], test: np.ndarray, *, draws: int, seed: int) -> list[dict[str, Any]]:
    """For each method and k: accuracy, f1 and auroc, means over classes, with intervals over the test texts (row numbers `test`), and the
    accuracy of each class."""
    weights = np.zeros((draws, int(test.max()) + 1))
    weights[:, test] = resamples(len(test), draws, seed)
    groups: dict[tuple[str, int | None], list[ProbeScores]] = {}
    for result in results:
        groups.setdefault((result.method, result.k), []).append(result)
    table = []
    for (method, k), members in groups.items():
        once = [measures(m.problem.test_labels, m.scores) for m in members]
        drawn = [measures(m.problem.test_labels, m.scores, weights[:, m.problem.test]) for m in members]
        row: dict[str, Any] = {"method": method, "k": k}
        for name in ("accuracy", "f1", "auroc"):
            row[name] = estimate(percentile_interval(_mean([o[name][0] for o in once]), _mean([d[name] for d in drawn]), len(test)))
        row["classes"] = {m.problem.name: float(o["accuracy"][0]) for m, o in zip(members, once, strict=True)}
        if members[0].columns is not None:
            row["columns"] = {m.problem.name: m.columns.tolist() for m in members}
        table.append(row)
    return table


def perturbation_figures(found: Perturbation, test: np.ndarray, *, draws: int, seed: int) -> dict[str, dict[str, Any]]:
    """{n: {tpp, intended, unintended}} of targeted probe perturbation, with intervals over the test texts; "diff_mean" as a baseline."""
    weights = np.zeros((draws, int(test.max()) + 1))
    weights[:, test] = resamples(len(test), draws, seed)
    once, drawn = found.scores(), found.scores(weights)
    return {
        n: {name: estimate(percentile_interval(value[0], drawn[n][name], len(test))) for name, value in row.items()} for n, row in once.items()
    }


def absorption_table(letters: Sequence[LetterAbsorption], tokens: np.ndarray, *, draws: int, seed: int) -> dict[str, Any]:
    """The means over letters, and a row a letter (`tokens`: the word of each row). Intervals of the scores are over each letter's test words,
    those of the number of main latents and of the probe's F1, of which a letter has one each, over letters."""
    drawn: dict[str, list[np.ndarray]] = {"fraction": [], "full": []}
    words = 0
    for i, letter in enumerate(letters):
        if not len(letter.rows):
            continue
        known, number = np.unique(tokens[letter.rows], return_inverse=True)
        words += len(known)
        weights = resamples(len(known), draws, seed + i)[:, number]
        for name, values in drawn.items():
            values.append(weights @ getattr(letter, name).astype(float) / weights.sum(axis=1))
    figures: dict[str, Any] = {name: {"value": value} for name, value in absorption_figures(letters).items()}
    for name, score in (("fraction", "mean_absorption_fraction_score"), ("full", "mean_full_absorption_score")):
        if drawn[name]:
            figures[score] = estimate(percentile_interval(figures[score]["value"], np.mean(drawn[name], axis=0), words))
    own = {"mean_num_split_features": [len(found.main) for found in letters], "mean_probe_f1": [found.probe_f1 for found in letters]}
    for name, values in own.items():
        means = resamples(len(letters), draws, seed) @ np.array(values, float) / len(letters)
        figures[name] = estimate(percentile_interval(figures[name]["value"], means, len(letters)))
    rows = [
        {
            "letter": found.letter, "main": found.main, "probe_f1": found.probe_f1, "sparse_f1": found.sparse_f1, "rows": len(found.rows),
            "fraction": float(found.fraction.mean()) if len(found.rows) else None, "full": float(found.full.mean()) if len(found.rows) else None,
            "absorbers": sorted({int(j) for j in found.absorber if j >= 0}),
        }
        for found in letters
    ]  # fmt: skip
    return {"figures": figures, "letters": rows}


def _mean(values: Sequence[Any]) -> Any:
    """Mean over the first axis of what has a value; NaN where nothing has."""
    array = np.asarray(values, float)
    known = np.isfinite(array)
    count = known.sum(axis=0)
    return np.where(count > 0, np.where(known, array, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)
