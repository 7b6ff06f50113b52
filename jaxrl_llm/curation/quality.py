"""Which rows are fit to train on: a quality score for each, and the filter that it makes.

The score comes from labels, or from telling rows apart from corrupted copies of them (corruptions.py), which needs none. As for
difficulty, length + TF-IDF and dense activations go through the same probe and stand beside it, and the AUROC is given for
each kind of corruption: a wrong gold answer is invisible to any feature of the prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit

from jaxrl_llm.curation.probes import Design, StackedDesign, as_design, auroc, compare, cross_validate, spearman
from jaxrl_llm.errors import UserError


@dataclass(frozen=True)
class Quality:
    """values: [N], higher is better. report: figures of every probe. log_odds: whether the values are the log-odds of a sound row."""

    values: np.ndarray
    report: dict[str, Any]
    log_odds: bool = True

    @property
    def expected_bad(self) -> np.ndarray | None:
        """[N] probability that a row is unfit, or None where the values do not say."""
        return expit(-self.values) if self.log_odds else None


def fit_quality(
    designs: Mapping[str, tuple[Design, Design]],
    sources: np.ndarray,
    kinds: np.ndarray,
    *,
    use: str = "sae",
    reference: str = "length_tfidf",
    free_scores: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
    **probe_options,
) -> Quality:
    """Self-supervised quality: a logistic probe between original rows and corrupted copies.

    designs: name -> (features of the N rows, features of the M copies). sources: [M] the row each copy was made from. kinds: [M]
    names of the corruptions. use: the design that gives the values. free_scores: name -> ([N], [M]) scores used as they are, such
    as the policy's log-probability of the gold answer. A row and its copy always share a fold; rows that took part get their
    out-of-fold score, so that no row is judged by a probe that was told it is good.

    report: {"probes": {NAME: {"value": AUROC, "low", "high", "n", "by_kind": {...}, "minus_reference"}}, "used", "counts"}.
    """
    if use not in designs and use not in (free_scores or {}):
        raise UserError(f"quality: no features {use!r}; one of {', '.join([*designs, *(free_scores or {})])}")
    sources, kinds = np.asarray(sources, int), np.asarray(kinds)
    originals = np.unique(sources)
    clean = np.concatenate([np.ones(len(originals)), np.zeros(len(sources))])
    groups = np.concatenate([originals, sources])

    scores, values = {}, {}
    for name, (rows, copies) in designs.items():
        rows, copies = as_design(rows), as_design(copies)
        stacked = StackedDesign(rows, copies)
        chosen = np.concatenate([originals, len(rows) + np.arange(len(sources))])
        options = {"folds": folds, "groups": groups, "seed": seed, "tick": tick, **probe_options}
        scores[name], probe = cross_validate(stacked, chosen, clean, "logistic", **options)
        if name == use:
            values[name] = probe.predict(rows)
            values[name][originals] = scores[name][: len(originals)]
    for name, (of_rows, of_copies) in (free_scores or {}).items():
        scores[name] = np.concatenate([np.asarray(of_rows)[originals], np.asarray(of_copies)])
        values[name] = np.asarray(of_rows, float)

    table = compare(scores, clean, auroc, reference=reference, groups=groups, draws=draws, seed=seed)
    for name, score in scores.items():
        above, below = score[: len(originals)], score[len(originals) :]
        table[name]["by_kind"] = {
            kind: {"value": auroc(np.concatenate([above, below[kinds == kind]]), np.arange(len(above) + n) < len(above)), "n": n}
            for kind, n in sorted(Counter(kinds.tolist()).items())
        }
    report = {"probes": table, "used": use, "reference": reference, "counts": {"rows": len(originals), "copies": len(sources)}}
    return Quality(values[use], report, log_odds=use in designs)


def fit_labelled_quality(
    designs: Mapping[str, Design | np.ndarray],
    labels: np.ndarray,
    *,
    use: str = "sae",
    reference: str = "length_tfidf",
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
    **probe_options,
) -> Quality:
    """Quality from labels [N] (NaN where unlabelled), higher is better: two different values fit a logistic probe judged by AUROC,
    more fit ridge judged by Spearman (a judge's score of 1-5, say). Labelled rows get their out-of-fold score."""
    labels = np.asarray(labels, float)
    rows = np.flatnonzero(np.isfinite(labels))
    levels = np.unique(labels[rows])
    if len(levels) < 2:
        raise UserError(f"quality: {len(rows)} labels, {len(levels)} different: a probe needs good rows and bad ones")
    if use not in designs:
        raise UserError(f"quality: no features {use!r}; one of {', '.join(designs)}")
    binary = len(levels) == 2
    y = (labels[rows] == levels[-1]).astype(float) if binary else labels[rows]
    model, measure = ("logistic", auroc) if binary else ("ridge", spearman)
    scores, values = {}, None
    for name, x in designs.items():
        design = as_design(x)
        scores[name], probe = cross_validate(design, rows, y, model, folds=folds, seed=seed, tick=tick, **probe_options)
        if name == use:
            values = probe.predict(design)
            values[rows] = scores[name]
    table = compare(scores, y, measure, reference=reference, draws=draws, seed=seed)
    report = {"probes": table, "used": use, "reference": reference, "measure": measure.__name__, "counts": {"labels": len(rows)}}
    return Quality(values, report, log_odds=binary)


def drop_share(told: np.ndarray | None, per_bad: float, most: float, otherwise: float) -> float:
    """The share of rows to drop: `per_bad` for every bad one that the told rows [N] (1 sound, 0 not, NaN unknown) let expect, `most` at
    most; `otherwise` where nothing is told."""
    return otherwise if told is None else min(per_bad * float(1 - np.nanmean(told)), most)


@dataclass(frozen=True)
class Filtered:
    """keep: [N] bool. reasons: why rows were dropped -> how many; a row counts under the first reason that hit it. cut: the
    quality below which rows went; None where none went for it, or each stratum has its own. margin: [N] quality less the cut
    of the row's stratum, at least 0 for kept rows; NaN for rows with a fault."""

    keep: np.ndarray
    reasons: dict[str, int]
    cut: float | None
    margin: np.ndarray


def filter_rows(
    quality: np.ndarray,
    drop_fraction: float,
    faults: Mapping[str, np.ndarray] | None = None,
    strata: np.ndarray | None = None,
    expected_bad: np.ndarray | None = None,
) -> Filtered:
    """Drop rows with a fault (name -> [N] bool: duplicates, empty answers, ...), then the `drop_fraction` of lowest quality among
    the rest. Of rows of equal quality at the cut, later ones go first.

    strata: [N] int, for a score that also depends on what a row is about or how hard it is: rows then compete inside their stratum
    only. expected_bad: [N] probability that a row is unfit; each stratum loses rows in proportion to its mean (at most all of
    them), without it the same share. Raises UserError when nothing is left.
    """
    if not 0 <= drop_fraction < 1:
        raise UserError(f"quality: drop_fraction is {drop_fraction}; give a share from 0 up to below 1")
    keep, reasons = np.ones(len(quality), bool), {}
    for name, hit in (faults or {}).items():
        reasons[name] = int((keep & hit).sum())
        keep &= ~hit
    rows = np.flatnonzero(keep)
    stratum = np.zeros(len(rows), int) if strata is None else np.unique(np.asarray(strata)[rows], return_inverse=True)[1]
    by_quality = rows[np.lexsort((-rows, quality[rows], stratum))]
    sizes = np.bincount(stratum)
    bad = np.ones(len(rows)) if expected_bad is None else np.asarray(expected_bad, float)[rows]
    counts = _drop_counts(sizes, np.bincount(stratum, bad) / np.maximum(sizes, 1), drop_fraction)
    margin, cut, dropped = np.full(len(quality), np.nan), None, 0
    for members, count in zip(np.split(by_quality, np.cumsum(sizes)[:-1]) if len(sizes) else [], counts, strict=True):
        worst, best = members[:count], members[count:]
        keep[worst] = False
        dropped += count
        cut = quality[worst].max() if count else None
        edge = [quality[group[at]] for group, at in ((worst, -1), (best, 0)) if len(group)]
        margin[members] = quality[members] - (np.mean(edge) if count else min(edge, default=0.0))
    reasons["low_quality"] = int(dropped)
    if not keep.any():
        raise UserError("quality: no row is left: " + ", ".join(f"{n} {name}" for name, n in reasons.items()))
    return Filtered(keep, reasons, float(cut) if cut is not None and strata is None else None, margin)


def _drop_counts(sizes: np.ndarray, bad: np.ndarray, drop_fraction: float) -> np.ndarray:
    """[S] rows to drop of each stratum of `sizes` [S]: shares proportional to `bad` [S], none above 1, that add up to
    `drop_fraction` of all rows. Rounded on the running sum, so that what is dropped adds up too."""
    total, share = int(round(drop_fraction * sizes.sum())), np.zeros(len(sizes))
    bad = np.maximum(bad, 1e-9)
    for _ in range(len(sizes)):  # each round fills up at least one stratum, or ends
        open_ = share < 1
        share[open_] = (total - sizes[~open_].sum()) * bad[open_] / max((sizes * bad)[open_].sum(), 1e-12)
        if (share <= 1).all():
            break
        share = np.minimum(share, 1.0)
    return np.diff(np.round(np.cumsum(sizes * share) + 1e-9).astype(int), prepend=0)


def difficulty_strata(cluster: np.ndarray, difficulty: np.ndarray, bins: int) -> np.ndarray:
    """[N] int: rows alike in what they are about and how hard they are: each cluster [N] in `bins` equal parts by difficulty [N]."""
    stratum = np.zeros(len(cluster), int)
    for number, name in enumerate(np.unique(cluster)):
        rows = np.flatnonzero(cluster == name)
        rank = np.argsort(np.argsort(difficulty[rows], kind="stable"), kind="stable")
        stratum[rows] = number * bins + rank * bins // len(rows)
    return stratum


def answer_length_columns(answers: Sequence[str | None]) -> np.ndarray:
    """[N, 2] log lengths of the answers in characters and terms: what log-probabilities must not be mistaken for."""
    texts = [a or "" for a in answers]
    return np.log1p(np.array([(len(t), len(t.split())) for t in texts], np.float32).reshape(-1, 2))
