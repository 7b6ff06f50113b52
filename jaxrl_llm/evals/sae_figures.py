"""The figures of `jaxrl-llm eval` for dictionaries, each with its 95% interval, as JSON values: {"value", "low", "high"}.

Tokens of one text are alike, so that texts are what is drawn anew: documents for what is measured on a stream, test texts for probes,
test words for absorption.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.evals.statistics import Interval, bootstrap_sums, percentile_interval, resamples
from sae.absorption import LetterAbsorption, absorption_figures
from sae.metrics import Statistics, density_figures
from sae.perturbation import Perturbation
from sae.probing import ProbeScores, measures
from sae.splice import recovered

HISTOGRAM = np.linspace(-6.0, 0.0, 49)  # log10 of the share of tokens


def estimate(found: Interval) -> dict[str, float | None]:
    """An interval as JSON; limits that there are none of are None."""
    value, low, high = (float(v) if np.isfinite(v) else None for v in (found.estimate, found.low, found.high))
    return {"value": value, "low": low, "high": high}


def core_figures(found: Statistics, *, draws: int, seed: int) -> dict[str, dict]:
    """Sparsity and reconstruction with intervals over documents; of the densities, figures of the whole set, none."""
    figures = {name: estimate(one) for name, one in bootstrap_sums(found.documents, found.of_sums, draws=draws, seed=seed).items()}
    return figures | {name: {"value": value} for name, value in density_figures(found.density_F).items()}


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
    """The means over letters, with intervals over each letter's test words (`tokens`: the word of each row), and a row a letter."""
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
