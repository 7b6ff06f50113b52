"""Statistics for comparing training runs: paired over seeds and items, never over independent halves.

A run's accuracy on one item is a number in [0, 1] (the mean of its k samples). Two arms are compared on the same seeds
and the same items; `difference` is in points of accuracy (100 x).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its confidence limits."""

    estimate: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def crossed_weights(groups: Sequence[Any], draws: int, rng: np.random.Generator) -> np.ndarray:
    """[draws, cells] how often a two-level bootstrap takes each cell: groups are drawn, then as many cells inside each."""
    groups = np.asarray(groups)
    members = [np.flatnonzero(groups == g) for g in dict.fromkeys(groups.tolist())]
    out = np.zeros((draws, len(groups)))
    for weights in out:
        for g in rng.integers(0, len(members), len(members)):
            weights += np.bincount(rng.choice(members[g], len(members[g])), minlength=len(groups))
    return out


def tails(cells: int, confidence: float = 0.95) -> tuple[float, float]:
    """The quantiles of a percentile bootstrap over `cells` units that make its interval as wide as Student's t (the expanded percentile
    interval of Hesterberg 2015): the plain one is too narrow for so few. One cell is no sample of cells: plain then."""
    tail = (1 - confidence) / 2
    if cells > 1:
        tail = float(stats.norm.cdf(-np.sqrt(cells / (cells - 1)) * stats.t.ppf(1 - tail, cells - 1)))
    return tail, 1 - tail


def expanded_limits(draws: np.ndarray, cells: int, confidence: float = 0.95) -> tuple[float, float]:
    """Limits of a percentile bootstrap over `cells` units, at its `tails`."""
    low, high = np.quantile(draws, tails(cells, confidence))
    return float(low), float(high)


def resamples(units: int, draws: int, seed: int) -> np.ndarray:
    """[draws, units] how often each unit is drawn by a bootstrap that draws as many as there are."""
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), draws).astype(float)


def percentile_interval(estimate: float, draws: np.ndarray, units: int, confidence: float = 0.95) -> Interval:
    """An estimate with the limits of its bootstrap draws (`expanded_limits` of `units` units); draws without a value (NaN) take no part, and
    with none left, or a single unit, the limits are NaN."""
    draws = np.asarray(draws, float)
    draws = draws[np.isfinite(draws)]
    if not len(draws) or units < 2:
        return Interval(float(estimate), float("nan"), float("nan"))
    return Interval(float(estimate), *expanded_limits(draws, units, confidence))


def pooled_sums(sums: Mapping[str, np.ndarray], most: int = 1000) -> dict[str, np.ndarray]:
    """Sums of units as those of at most `most` units, neighbours added up: what a bootstrap over very many units would take no longer for."""
    count = len(next(iter(sums.values())))
    edges = np.arange(min(most, count)) * count // min(most, count)
    return {name: np.add.reduceat(np.asarray(values, float), edges) for name, values in sums.items()}


def bootstrap_sums(
    sums: Mapping[str, np.ndarray], figures: Callable[[dict[str, Any]], Mapping[str, Any]], *, draws: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Figures that are functions of totals over units, with 95% limits of a bootstrap over the units.

    sums: name -> [units] sums of each; figures: of their totals, scalars or arrays with an entry a draw, name -> figure.
    """
    estimates = figures({name: float(np.sum(values)) for name, values in sums.items()})
    pooled = pooled_sums(sums)
    units = len(next(iter(pooled.values())))
    weights = resamples(units, draws, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = figures({name: weights @ values for name, values in pooled.items()})
    return {name: percentile_interval(value, found[name], units) for name, value in estimates.items()}


def paired_bootstrap(
    a_SI: np.ndarray, b_SI: np.ndarray, groups: Sequence[Any] | None = None, *, draws: int = 4000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of a - b with a crossed bootstrap: groups, cells inside them, and items are resampled; limits as `expanded_limits`.

    a_SI, b_SI: [cells, items], paired entry by entry. A cell is one pair of runs (a seed, say). Every cell has the same items, so a draw of
    items counts for all cells at once: drawn anew inside each cell, what is easy or hard about an item would seem to average out. groups:
    [cells] what cells share (their base policy, say); None = nothing. An item without a value (NaN) in either arm counts in neither. With
    one cell only items are resampled, and the interval then says nothing about other seeds. Raises ValueError for unequal shapes or
    an empty comparison.
    """
    a, b = np.atleast_2d(np.asarray(a_SI, float)), np.atleast_2d(np.asarray(b_SI, float))
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"paired arms need equal, non-empty shapes; got {a.shape} and {b.shape}")
    d, rng = a - b, np.random.default_rng(seed)
    valid = ~np.isnan(d)
    if not valid.any():
        raise ValueError("paired arms have no item with a value in both")
    groups = np.arange(len(d)) if groups is None else np.asarray(groups)
    cells_DC = crossed_weights(groups if len(set(groups.tolist())) > 1 else np.arange(len(d)), draws, rng)
    items_DI = rng.multinomial(d.shape[1], np.full(d.shape[1], 1 / d.shape[1]), draws)
    total = np.sum((cells_DC @ np.where(valid, d, 0.0)) * items_DI, axis=1)
    counted = np.sum((cells_DC @ valid.astype(float)) * items_DI, axis=1)
    means = total[counted > 0] / counted[counted > 0]
    return Interval(float(np.mean(d[valid])), *expanded_limits(means, len(d), confidence))


def paired_t(a_S: np.ndarray, b_S: np.ndarray, *, confidence: float = 0.95) -> Interval:
    """Mean of a - b over seeds with Student's t interval; infinite limits for a single seed.

    With five to ten seeds this is the honest one: a percentile bootstrap of so few is too narrow.
    """
    d = np.asarray(a_S, float) - np.asarray(b_S, float)
    if d.size < 2:
        return Interval(float(d.mean()), float("-inf"), float("inf"))
    half = stats.t.ppf(0.5 + confidence / 2, d.size - 1) * d.std(ddof=1) / np.sqrt(d.size)
    return Interval(float(d.mean()), float(d.mean() - half), float(d.mean() + half))


def wilson(successes: int, n: int, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927)."""
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n > 0; got {successes} of {n}")
    z, p = stats.norm.ppf(0.5 + confidence / 2), successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, float(max(centre - half, 0.0)), float(min(centre + half, 1.0)))  # rounding may step over the ends


def share_limits(span: Interval, units: int) -> Interval:
    """A share with the limits of its bootstrap over units; where all of them are alike, at 0 or 1, so that no draw differs, with Wilson's of so many
    units: that nothing varied in the sample is no certainty."""
    return wilson(round(span.estimate * units), units) if units and span.low == span.high and span.estimate in (0.0, 1.0) else span


def steps_saved(
    steps: np.ndarray, a_CE: np.ndarray, b_CE: np.ndarray, groups: Sequence[Any] | None = None, *, draws: int = 4000, seed: int = 0
) -> Interval | None:
    """Share of the run that `a` needs less than `b` to the accuracy at which the worse of the two ends.

    steps: [E] of the evaluations; a_CE, b_CE: [cells, E] accuracies of paired runs. Of the curves' means over cells: where a ends
    higher, 1 - (step at which it reaches b's end) / (last step); where b does, the negative of the same for b. So it changes its sign
    when a and b change places, and is zero on average where they do not differ; asking only when a reaches b's end would credit a
    with its luck and never charge it. Limits: bootstrap over groups and cells as in `paired_bootstrap`. None where the worse of
    the two ends no higher than it began: there was nothing to reach.
    """
    a, b = np.atleast_2d(np.asarray(a_CE, float)), np.atleast_2d(np.asarray(b_CE, float))

    def signed(weights: np.ndarray) -> float:
        mean_a, mean_b = np.average(a, axis=0, weights=weights), np.average(b, axis=0, weights=weights)
        ahead, behind, sign = (mean_a, mean_b, 1.0) if mean_a[-1] >= mean_b[-1] else (mean_b, mean_a, -1.0)
        return sign * (1 - min(steps_to_target(steps, ahead, behind[-1]) / steps[-1], 1.0))

    worse = a if a[:, -1].mean() < b[:, -1].mean() else b
    if worse[:, -1].mean() <= worse[:, 0].mean() + 1e-9:
        return None
    estimate = signed(np.ones(len(a)))
    if len(a) == 1:
        return Interval(estimate, float("-inf"), float("inf"))
    groups = np.arange(len(a)) if groups is None or len(set(groups)) == 1 else np.asarray(groups)
    found = np.array([signed(w) for w in crossed_weights(groups, draws, np.random.default_rng(seed))])
    return Interval(estimate, *expanded_limits(found, len(a)))


def steps_to_target(steps: np.ndarray, accuracy: np.ndarray, target: float) -> float:
    """First step at which the curve reaches `target`, linear between evaluations; inf if never. Of one run's curve that may be luck: give
    the mean of several."""
    x, y = np.asarray(steps, float), np.asarray(accuracy, float)
    reached = np.flatnonzero(y >= target)
    if not len(reached):
        return float("inf")
    i = reached[0]
    return float(x[i] if i == 0 else x[i - 1] + (target - y[i - 1]) / (y[i] - y[i - 1]) * (x[i] - x[i - 1]))
