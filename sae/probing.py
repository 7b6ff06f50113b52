"""Probes on an SAE's latents and on the activations they come from: k-sparse probing beside DiffMean, a dense probe and raw dimensions.

What is chosen or fitted is chosen and fitted on training rows alone. Letters: N rows, C columns, R resamples.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.sparse

from sae.errors import SAEError
from sae.pooling import Pooled

KS = (1, 2, 5, 10, 20, 50)
MAX_ITER = 2000


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear classifier on raw columns: score = x @ weights + bias, positive for the class."""

    weights: np.ndarray
    bias: float

    def scores(self, x: Any) -> np.ndarray:
        """[N] of rows [N, C]."""
        return np.asarray(x @ self.weights).ravel() + self.bias


@dataclasses.dataclass(frozen=True)
class Problem:
    """One class against the rest, as many of them as of the class: row numbers and labels (1 for the class) of both splits."""

    name: str
    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class ProbeScores:
    """A method's scores of a problem's test rows; k: how many columns it reads (None: all). columns: which, where it chose."""

    method: str
    k: int | None
    problem: Problem
    scores: np.ndarray
    columns: np.ndarray | None = None


def split(labels: Sequence[Any], texts: Sequence[Any] | None = None, *, test_share: float = 0.25, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(train, test) row numbers, each class shared alike. texts: rows of one text (hashable: a string, a tuple of ids) are all in one
    of the two, so that no test row was seen. Raises SAEError for fewer than two classes, and a class without two different texts."""
    labels, keys = np.asarray(labels), np.arange(len(labels)) if texts is None else np.asarray([hash(text) for text in texts])
    if len(set(labels.tolist())) < 2:
        raise SAEError("probe: all labels are alike; a probe needs two classes")
    if not 0 < test_share < 1:
        raise SAEError(f"probe: test_share is {test_share}; give a share between 0 and 1")
    rng, in_test, owner = np.random.default_rng(seed), {}, {}
    for label, key in zip(labels.tolist(), keys.tolist(), strict=True):
        owner.setdefault(key, label)  # a text with several labels is shared out with its first
    for label in dict.fromkeys(labels.tolist()):
        own = [key for key, of in owner.items() if of == label]
        if len(own) < 2:
            raise SAEError(f"probe: class {label!r} has {len(own)} different text(s); it needs one to train on and one to test on")
        own = [own[i] for i in rng.permutation(len(own))]
        count = min(max(1, round(test_share * len(own))), len(own) - 1)
        in_test |= {key: i < count for i, key in enumerate(own)}
    test = np.array([in_test[key] for key in keys.tolist()])
    return np.flatnonzero(~test), np.flatnonzero(test)


def one_vs_rest(labels: Sequence[Any], train: np.ndarray, test: np.ndarray, *, seed: int = 0) -> list[Problem]:
    """A balanced problem for each class: its rows, and as many others drawn from the rest (or all of them, where they are fewer, beside as
    many of the class). Of two classes there is one problem, the second against the first, for the other is its mirror image."""
    of: np.ndarray = np.asarray(labels)
    classes: list[Any] = sorted(set(of.tolist()), key=str)
    rng = np.random.default_rng(seed)

    def balanced(rows: np.ndarray, label: Any) -> tuple[np.ndarray, np.ndarray]:
        own, rest = rows[of[rows] == label], rows[of[rows] != label]
        size = min(len(own), len(rest))
        own, rest = (np.sort(rng.permutation(part)[:size]) for part in (own, rest))
        return np.concatenate([own, rest]), np.repeat([1, 0], size)

    problems = []
    for label in classes[1:] if len(classes) == 2 else classes:
        parts = (*balanced(train, label), *balanced(test, label))
        if not len(parts[0]) or not len(parts[2]):
            raise SAEError(f"probe: class {label!r}, or the rest, has no row to train on or none to test on")
        problems.append(Problem(str(label), *parts))
    return problems


def column_moments(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """(mean [C], standard deviation [C]) of the columns, dense or sparse, float64."""
    if scipy.sparse.issparse(x):
        x = x.astype(np.float64)
        mean = np.asarray(x.mean(axis=0)).ravel()
        return mean, np.sqrt(np.maximum(np.asarray(x.multiply(x).mean(axis=0)).ravel() - mean**2, 0.0))
    x = np.asarray(x, np.float64)
    return x.mean(axis=0), x.std(axis=0)


def mean_difference(x: Any, labels: np.ndarray) -> np.ndarray:
    """[C] mean of the class's rows less the mean of the others'."""
    return column_moments(x[labels == 1])[0] - column_moments(x[labels == 0])[0]


def fit_probe(x: Any, labels: np.ndarray, *, penalty: float = 1.0, per_column: bool = True) -> Probe:
    """Logistic regression on columns standardised by these rows, with weights for raw columns; constant ones get weight 0.

    penalty: the inverse of scikit-learn's C, of the L2 penalty on the standardised columns' weights. per_column: each column is divided by
    its own standard deviation; otherwise all by one, the root of their mean variance, which leaves directions between columns as they
    are: for a probe whose direction is what is asked for.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x = np.asarray(x.todense() if scipy.sparse.issparse(x) else x, np.float64)
    mean, spread = column_moments(x)
    spread = spread if per_column else np.full_like(spread, np.sqrt(np.mean(spread**2)))
    spread = np.where(spread > 1e-12 * np.maximum(1.0, np.abs(mean)), spread, np.inf)
    model = LogisticRegression(C=1.0 / penalty, max_iter=MAX_ITER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the last step is a good probe too
        model.fit((x - mean) / spread, labels)
    weights = model.coef_[0] / spread
    return Probe(weights, float(model.intercept_[0] - mean @ weights))


def diff_mean_probe(x: np.ndarray, labels: np.ndarray) -> Probe:
    """DiffMean: the difference of the classes' means as direction, its threshold by logistic regression on the projection alone."""
    direction = mean_difference(x, labels)
    along = fit_probe((np.asarray(x, np.float64) @ direction)[:, None], labels)
    return Probe(direction * along.weights[0], along.bias)


def top_columns(x: Any, labels: np.ndarray, k: int) -> np.ndarray:
    """The k columns with the largest absolute difference of class means, largest first."""
    size = np.abs(mean_difference(x, labels))
    return np.argsort(-size, kind="stable")[:k]


def probe_problem(pooled: Pooled, problem: Problem, ks: Sequence[int] = KS) -> Iterator[ProbeScores]:
    """Each method's scores of the problem's test rows, fitted on its training rows.

    sae_top_k, llm_top_k: logistic probes on the k latents (raw dimensions) with the largest difference of class means; a k above
    the number of columns reads all. diff_mean and dense: on all raw dimensions. majority: the more frequent label of the training rows.
    """
    labels = problem.train_labels
    for method, x in (("sae_top_k", pooled.latents), ("llm_top_k", pooled.activations)):
        train, test = x[problem.train], x[problem.test]
        order = top_columns(train, labels, max(ks))
        for k in sorted({min(k, x.shape[1]) for k in ks}):
            columns = order[:k]
            yield ProbeScores(method, k, problem, fit_probe(train[:, columns], labels).scores(test[:, columns]), columns)
    train, test = pooled.activations[problem.train], pooled.activations[problem.test]
    yield ProbeScores("diff_mean", None, problem, diff_mean_probe(train, labels).scores(test))
    yield ProbeScores("dense", None, problem, fit_probe(train, labels).scores(test))
    yield ProbeScores("majority", None, problem, np.full(len(problem.test), 1.0 if labels.mean() > 0.5 else -1.0))


def measures(labels: np.ndarray, scores: np.ndarray, weights_RN: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """accuracy, f1 and auroc [R] of scores (positive for label 1) with row weights [R, N] (default: one resample, every row once).

    AUROC counts a tie half; F1 is 0 where nothing is found; all are NaN where a resample lacks what they are shares of.
    """
    labels = np.asarray(labels)
    weights = np.ones((1, len(labels))) if weights_RN is None else np.asarray(weights_RN, float)
    said, true = scores > 0, labels == 1
    hit, wrong = weights @ (said & true), weights @ (said != true)
    total, found = weights.sum(axis=1), 2 * hit + wrong
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) > 0])
    positive = np.add.reduceat(weights[:, order] * true[order], starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * ~true[order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    pairs = positive.sum(axis=1) * negative.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "accuracy": 1.0 - wrong / total,
            "f1": np.where(found > 0, 2 * hit / found, np.nan),
            "auroc": np.sum(positive * (below + 0.5 * negative), axis=1) / np.where(pairs > 0, pairs, np.nan),
        }
