"""Statistics for comparing training runs: paired over seeds and items, never over independent halves.

A run's accuracy on one item is a number in [0, 1] (the mean of its k samples). Two arms are compared on the same seeds
and the same items; `difference` is in points of accuracy (100 x).
"""

from __future__ import annotations

import dataclasses

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


def paired_bootstrap(
    a_SI: np.ndarray, b_SI: np.ndarray, *, draws: int = 4000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Mean of a - b with a two-level percentile bootstrap: seeds are resampled, then items inside each drawn seed.

    a_SI, b_SI: [seeds, items], paired entry by entry. An item without a value (NaN) in either arm counts in neither. With one seed only
    items are resampled, and the interval then says nothing about other seeds. Raises ValueError for unequal shapes or an
    empty comparison.
    """
    a, b = np.atleast_2d(np.asarray(a_SI, float)), np.atleast_2d(np.asarray(b_SI, float))
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"paired arms need equal, non-empty shapes; got {a.shape} and {b.shape}")
    d, rng = a - b, np.random.default_rng(seed)
    d = d[:, ~np.isnan(d).all(axis=0)]
    d = d[~np.isnan(d).all(axis=1)]
    if d.size == 0:
        raise ValueError("paired arms have no item with a value in both")
    n_seeds, n_items = d.shape
    means = np.empty(draws)
    for i in range(draws):
        rows = rng.integers(0, n_seeds, n_seeds)
        means[i] = np.nanmean(d[rows[:, None], rng.integers(0, n_items, (n_seeds, n_items))])
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(np.nanmean(d)), float(low), float(high))


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
    return Interval(p, float(centre - half), float(centre + half))


def steps_to_target(steps: np.ndarray, accuracy: np.ndarray, target: float, *, window: int = 3) -> float:
    """First step at which the trailing moving average of `window` evaluations reaches `target`; inf if never.

    Between two evaluations the step is interpolated linearly. The average keeps one lucky evaluation from counting.
    """
    x, y = np.asarray(steps, float), np.asarray(accuracy, float)
    smooth = np.array([y[max(0, i - window + 1) : i + 1].mean() for i in range(len(y))])
    reached = np.flatnonzero(smooth >= target)
    if not len(reached):
        return float("inf")
    i = reached[0]
    if i == 0 or smooth[i] == smooth[i - 1]:
        return float(x[i])
    return float(x[i - 1] + (target - smooth[i - 1]) / (smooth[i] - smooth[i - 1]) * (x[i] - x[i - 1]))
