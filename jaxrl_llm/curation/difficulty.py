"""How hard is each prompt: a proxy from a small labelled subset, or from no labels at all.

Labels are pass rates of the policy on some rows (rolled out by the caller), or a column of the data. The published probe is an
ElasticNet on SAE features (SAERL, arXiv 2605.27354). It is never reported alone: beside it stand ridge on the same features,
length, length + TF-IDF, dense activations and whatever else the caller passes, each cross-validated in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.stats import rankdata

from jaxrl_llm.curation.probes import Design, as_design, calibrate, compare, cross_validate, spearman
from jaxrl_llm.errors import UserError

FREE = ("surprisal", "active_count")  # label-free proxies
USES = ("sae", "sae+length", "random_sae", "dense_mean", "dense_max", "length_tfidf", "labels")  # what the proxy of `curate` may read


@dataclass(frozen=True)
class Difficulty:
    """values: [N] in [0, 1], higher is harder; the expected fail rate where the labels were pass rates, else the expected label
    scaled to [0, 1]. report: figures of every probe (see `fit_difficulty`)."""

    values: np.ndarray
    report: dict[str, Any]


def fit_difficulty(
    designs: Mapping[str, Design | np.ndarray | sparse.csr_matrix],
    labels: np.ndarray,
    *,
    use: str = "sae",
    models: Sequence[str] = ("elastic_net", "ridge"),
    reference: str = "length_tfidf",
    free_scores: Mapping[str, np.ndarray] | None = None,
    max_labels: int = 2000,
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
    **probe_options,
) -> Difficulty:
    """Fit a difficulty probe on each design and take one of them.

    designs: name -> features [N, D]. labels: [N] difficulty labels, higher is harder (1 - pass rate, a level, a number of
    steps), NaN where unlabelled; labels outside [0, 1] are scaled to it. use: the design whose better model gives the values,
    or "labels" to take the labels themselves and the first design's probe where they are missing. free_scores: label-free
    scores [N] to report beside. Of more than `max_labels` labels a random subset is used, and the rest checks the probes.

    report: {"labels": {...}, "probes": {"NAME/MODEL": {"value": cross-validated Spearman, "low", "high", "n", "held_out",
    "minus_reference": {...}}}, "used": "NAME/MODEL", "reference": ...}. Raises UserError without two different labels.
    """
    designs = {name: as_design(x) for name, x in designs.items()}
    labels = np.asarray(labels, dtype=np.float64)
    known = np.flatnonzero(np.isfinite(labels))
    if len(known) < 2 or np.ptp(labels[known]) == 0:
        raise UserError(
            f"difficulty: {len(known)} labels, {len(np.unique(labels[known]))} different: a probe needs rows of different "
            "difficulty; label more rows, or take a label-free proxy"
        )
    if use != "labels" and use not in designs:
        raise UserError(f"difficulty: no features {use!r}; one of {', '.join(designs)} or labels")
    low, high = (0.0, 1.0) if labels[known].min() >= 0 and labels[known].max() <= 1 else (labels[known].min(), labels[known].max())
    scaled = (labels - low) / (high - low)
    rows = np.sort(np.random.default_rng([seed, 1]).permutation(known)[:max_labels])
    rest = np.setdiff1d(known, rows)
    y = scaled[rows]

    scores, probes = {}, {}
    for name, design in designs.items():
        for model in models:
            key = f"{name}/{model}"
            scores[key], probes[key] = cross_validate(design, rows, y, model, folds=folds, seed=seed, tick=tick, **probe_options)
    best_reference = _best(scores, y, reference)
    free = {name: np.asarray(s)[rows] for name, s in (free_scores or {}).items()}
    table = compare({**scores, **free}, y, spearman, reference=best_reference, draws=draws, seed=seed)
    for key, probe in probes.items():
        design = designs[key.split("/")[0]]
        table[key] |= {"penalty": probe.penalty, "active": int((probe.weights != 0).sum())}
        if len(rest):
            table[key]["held_out"] = spearman(probe.predict(design, rest), scaled[rest])
    for name, score in (free_scores or {}).items():
        if len(rest):
            table[name]["held_out"] = spearman(np.asarray(score)[rest], scaled[rest])

    used = _best(scores, y, use if use in designs else next(iter(designs)))
    to_unit = calibrate(scores[used], y)
    values = to_unit(probes[used].predict(designs[used.split("/")[0]]))
    if use == "labels":
        values = np.where(np.isfinite(scaled), scaled, values)
    report = {
        "labels": {"count": len(known), "used": len(rows), "held_out": len(rest), "lowest": float(low), "highest": float(high)},
        "probes": table,
        "used": "labels" if use == "labels" else used,
        "reference": best_reference,
        "calibration": calibration_table(to_unit(scores[used]), y),
    }
    return Difficulty(np.clip(values, 0.0, 1.0), report)


def _best(scores: Mapping[str, np.ndarray], y: np.ndarray, name: str) -> str | None:
    """Of the probes on design `name`, the one of highest cross-validated Spearman; None where there is none."""
    mine = [key for key in scores if key.split("/")[0] == name]
    return max(mine, key=lambda key: spearman(scores[key], y)) if mine else None


def calibration_table(predicted: np.ndarray, target: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Equal-count bins of out-of-fold predictions: mean predicted and mean true value, count."""
    parts = np.array_split(np.argsort(predicted, kind="stable"), min(bins, len(predicted)))
    return [{"predicted": float(predicted[p].mean()), "observed": float(target[p].mean()), "n": len(p)} for p in parts]


def unit_ranks(score: np.ndarray) -> np.ndarray:
    """Any score as a difficulty in (0, 1): its rank, ties shared."""
    return (rankdata(score) - 0.5) / len(score)


def without_length(score: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """What is left of `score` [N] after a least-squares line on log length (tokens)."""
    basis = np.stack([np.ones(len(score)), np.log(np.maximum(lengths, 1))], axis=1)
    return score - basis @ np.linalg.lstsq(basis, score, rcond=None)[0]


def surprisal(blocks, width: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """[N] -log probability (nats) of each row's set of active features under independent features of the pool's frequencies
    (methods notes 5.3, difficulty D). blocks: a function that gives the CSR blocks of [N, width] in order, called twice.
    lengths: [N] tokens; where given, length is regressed out."""
    frequency, n = np.zeros(width), 0
    for block in blocks():
        frequency += np.bincount(block.indices[block.data != 0], minlength=width)
        n += block.shape[0]
    frequency = (frequency + 0.5) / (n + 1)
    silent = -np.log1p(-frequency)
    swing = -np.log(frequency) - silent
    parts = [silent.sum() + (block != 0).astype(np.float64) @ swing for block in blocks()]
    out = np.concatenate(parts) if parts else np.empty(0)
    return out if lengths is None else without_length(out, lengths)


def active_count(blocks, lengths: np.ndarray | None = None) -> np.ndarray:
    """[N] number of active features of each row; with `lengths` the part that length does not explain."""
    out = np.concatenate([np.asarray((block != 0).sum(axis=1), np.float64).ravel() for block in blocks()])
    return out if lengths is None else without_length(out, lengths)
