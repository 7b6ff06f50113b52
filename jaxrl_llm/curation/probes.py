"""Linear probes with cross-validation, and comparisons of probes with bootstrap intervals.

Every probe, ours or a baseline, goes through the same code: folds that keep a group together, its penalty chosen inside each
training fold, scores out of fold, and intervals that resample rows (or groups) jointly for all probes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import sparse
from scipy.special import expit, logit
from scipy.stats import rankdata

from jaxrl_llm.curation.threads import blas_threads_for
from jaxrl_llm.errors import UserError

MODELS = ("elastic_net", "ridge", "logistic")
CHUNK_ROWS = 4096
LEAST_SPREAD = 2.0**-11  # of a column's standard deviation over its size: below, float32 left three digits of it, and what follows is rounding


class Design(Protocol):
    """Feature rows that may be too many to hold dense at once."""

    def __len__(self) -> int: ...

    def rows(self, indices: np.ndarray) -> np.ndarray | sparse.csr_matrix: ...


@dataclass(frozen=True)
class ArrayDesign:
    """A Design over an array or CSR matrix [N, D] in memory."""

    x: np.ndarray | sparse.csr_matrix

    def __len__(self) -> int:
        return self.x.shape[0]

    def rows(self, indices: np.ndarray) -> np.ndarray | sparse.csr_matrix:
        return self.x[indices]


@dataclass(frozen=True)
class JoinedDesign:
    """Two designs side by side: the columns of `first`, then those of `second`. To a probe's penalty the two weigh the same,
    whatever their widths: ten likelihoods are not drowned by two thousand latents."""

    first: Design
    second: Design

    def __len__(self) -> int:
        return len(self.first)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        return np.concatenate([_dense(self.first.rows(indices)), _dense(self.second.rows(indices))], axis=1)

    @property
    def scales(self) -> np.ndarray:
        """[D] what standardised columns are multiplied by: each side then has half of the total variance."""
        sides = [column_scales(self.first), column_scales(self.second)]
        total = sum(np.square(side).sum() for side in sides)
        return np.concatenate([side * np.sqrt(total / 2 / np.square(side).sum()) for side in sides])


@dataclass(frozen=True)
class StackedDesign:
    """The rows of `first`, then those of `second`: originals and their corrupted copies."""

    first: Design
    second: Design

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        indices = np.asarray(indices)
        above = indices < len(self.first)
        upper = _dense(self.first.rows(indices[above]))
        out = np.empty((len(indices), upper.shape[1]), np.float32)
        out[above] = upper
        if not above.all():
            out[~above] = _dense(self.second.rows(indices[~above] - len(self.first)))
        return out

    @property
    def scales(self) -> np.ndarray:
        return column_scales(self.first)


@dataclass(frozen=True)
class SliceDesign:
    """Rows start .. stop - 1 of a design."""

    whole: Design
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def rows(self, indices: np.ndarray) -> np.ndarray | sparse.csr_matrix:
        return self.whole.rows(np.asarray(indices, int) + self.start)

    @property
    def scales(self) -> np.ndarray:
        return column_scales(self.whole)


def column_scales(design: Design) -> np.ndarray:
    """[D] a design's own column scales, or ones."""
    scales = getattr(design, "scales", None)
    return np.ones(design.rows(np.empty(0, int)).shape[1]) if scales is None else scales


def as_design(x) -> Design:
    """Wrap an array or sparse matrix; a Design passes through."""
    if hasattr(x, "rows"):
        return x
    if sparse.issparse(x):
        return ArrayDesign(x.tocsr())
    x = np.asarray(x, dtype=np.float32)
    return ArrayDesign(x[:, None] if x.ndim == 1 else x)


def _dense(x) -> np.ndarray:
    return np.asarray(x.toarray() if sparse.issparse(x) else x, dtype=np.float32)


@dataclass(frozen=True)
class Probe:
    """A fitted linear score: row -> row[columns] . weights + intercept. `penalty` is the chosen regularisation strength."""

    columns: np.ndarray
    weights: np.ndarray
    intercept: float
    penalty: float

    def predict(self, design: Design, indices: np.ndarray | None = None) -> np.ndarray:
        """[len(indices)] scores (all rows where indices is None), CHUNK_ROWS rows in memory at a time."""
        indices = np.arange(len(design)) if indices is None else np.asarray(indices)
        chunks = [indices[i : i + CHUNK_ROWS] for i in range(0, len(indices), CHUNK_ROWS)]
        scores = [np.asarray(design.rows(c)[:, self.columns] @ self.weights).ravel() + self.intercept for c in chunks]
        return np.concatenate(scores) if scores else np.empty(0)


def fit_probe(
    x: np.ndarray,
    y: np.ndarray,
    model: str,
    *,
    scales: np.ndarray | None = None,
    max_columns: int = 2048,
    l1_ratio: float = 0.5,
    seed: int = 0,
) -> Probe:
    """Fit one probe on x [N, D], its penalty chosen by cross-validation on these rows alone.

    model: "ridge" (leave-one-out), "elastic_net" (3 folds over a path of penalties; `l1_ratio`), "logistic" (L2, y in {0, 1},
    3 folds by log-likelihood). Columns are standardised, then multiplied by `scales` [D] where given; of more than `max_columns` those of
    largest variance are used (no labels enter the choice), and none that is constant to within `LEAST_SPREAD` of its mean. A constant y
    gives a constant probe.
    """
    if model not in MODELS:
        raise UserError(f"probe: no model {model!r}; one of {', '.join(MODELS)}")
    columns, x, mean, scale = _standardise(x, max_columns)
    if scales is not None:
        x, scale = x * scales[columns].astype(np.float32), scale / scales[columns]
    if np.ptp(y) == 0 or x.shape[1] == 0:
        return Probe(columns, np.zeros(len(columns)), float(np.mean(y)), 0.0)
    with warnings.catch_warnings(), blas_threads_for(x.size):
        warnings.simplefilter("ignore")  # convergence at the weakest penalties of the path, which are not chosen
        weights, intercept, penalty = FITS[model](x, y, l1_ratio, seed)
    weights = np.asarray(weights, dtype=np.float64).ravel() / scale
    return Probe(columns, weights, float(intercept - weights @ mean), float(penalty))


def _standardise(x: np.ndarray, max_columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(columns used, standardised columns, their means and scales)."""
    if sparse.issparse(x):
        mean = np.asarray(x.mean(axis=0)).ravel()
        variance = np.asarray(x.multiply(x).mean(axis=0)).ravel() - mean**2
    else:
        mean, variance = x.mean(axis=0), x.var(axis=0)
    columns = np.sort(np.argsort(-variance, kind="stable")[:max_columns])
    columns = columns[variance[columns] > np.maximum(1e-12, np.square(LEAST_SPREAD * mean[columns]))]
    mean, scale = np.asarray(mean[columns], np.float64), np.sqrt(np.asarray(variance[columns], np.float64))
    return columns, (_dense(x[:, columns]) - mean.astype(np.float32)) / scale.astype(np.float32), mean, scale


def _fit_ridge(x, y, l1_ratio, seed):
    from sklearn.linear_model import RidgeCV

    fit = RidgeCV(alphas=x.shape[1] * np.logspace(-3, 3, 13)).fit(x, y)
    return fit.coef_, fit.intercept_, fit.alpha_


def _fit_elastic_net(x, y, l1_ratio, seed):
    from sklearn.linear_model import ElasticNetCV
    from sklearn.model_selection import KFold

    folds = KFold(min(3, len(y)), shuffle=True, random_state=seed)
    fit = ElasticNetCV(l1_ratio=l1_ratio, alphas=16, eps=0.01, cv=folds, tol=1e-3, max_iter=300, random_state=seed).fit(x, y)
    return fit.coef_, fit.intercept_, fit.alpha_


def _fit_logistic(x, y, l1_ratio, seed):
    """Penalty by the log-likelihood of three inner folds, from the L2 path; then a fit on everything. Not by AUROC: on few rows one pair
    that changes places, for a rounding of 1e-6, then moves the penalty by decades, and its scores are no log-odds."""
    from sklearn.linear_model import LogisticRegression

    strengths = np.logspace(-4, 1, 6) / max(x.shape[1] / 100, 1)
    fold, sign = fold_numbers(np.arange(len(y)), 3, seed), 2 * y - 1
    loss = np.zeros(len(strengths))
    for f in range(3):
        train, test = fold != f, fold == f
        if len(set(y[train])) < 2:
            continue
        for i, c in enumerate(strengths):
            fit = LogisticRegression(C=c, max_iter=100, tol=1e-3).fit(x[train], y[train])
            loss[i] += np.logaddexp(0, -sign[test] * fit.decision_function(x[test])).sum()
    strength = strengths[np.argmin(loss)]
    fit = LogisticRegression(C=strength, max_iter=200, tol=1e-3).fit(x, y)
    return fit.coef_, fit.intercept_[0], strength


FITS = {"ridge": _fit_ridge, "elastic_net": _fit_elastic_net, "logistic": _fit_logistic}


def fold_numbers(groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """[N] fold of each row; rows of one group share a fold, folds hold equally many groups (up to one)."""
    _, group = np.unique(groups, return_inverse=True)
    n = group.max() + 1
    return np.random.default_rng(seed).permutation(np.arange(n) % min(folds, n))[group]


def cross_validate(
    design: Design,
    rows: np.ndarray,
    y: np.ndarray,
    model: str,
    *,
    folds: int = 5,
    groups: np.ndarray | None = None,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
    **options,
) -> tuple[np.ndarray, Probe]:
    """(out-of-fold scores [n] of `rows`, a probe fitted on all of them). y, groups: [n], aligned with rows. `tick` is called
    after each of the folds + 1 fits. Raises UserError for fewer than two groups."""
    fold = fold_numbers(rows if groups is None else groups, folds, seed)
    if fold.max() < 1:
        raise UserError("probe: cross-validation needs at least two labelled rows")
    x, out = design.rows(np.asarray(rows)), np.empty(len(rows))
    options["scales"] = getattr(design, "scales", None)
    for f in range(fold.max() + 1):
        test = fold == f
        probe = fit_probe(x[~test], y[~test], model, seed=seed, **options)
        out[test] = np.asarray(x[test][:, probe.columns] @ probe.weights).ravel() + probe.intercept
        tick()
    probe = fit_probe(x, y, model, seed=seed, **options)
    tick()
    return out, probe


# --------------------------------------------------------------------------------------------------------------------
# Measures
# --------------------------------------------------------------------------------------------------------------------


def spearman(score: np.ndarray, target: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where one side is constant."""
    a, b = rankdata(score), rankdata(target)
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale > 0 else 0.0


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve, ties count half; 0.5 where one class is missing."""
    positive = np.asarray(positive, bool)
    n1, n0 = positive.sum(), (~positive).sum()
    if n1 == 0 or n0 == 0:
        return 0.5
    return float((rankdata(score)[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def compare(
    scores: Mapping[str, np.ndarray],
    target: np.ndarray,
    measure: Callable[[np.ndarray, np.ndarray], float],
    *,
    reference: str | None = None,
    groups: np.ndarray | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """{name: {"value", "low", "high", "n"}} with 95% percentile bootstrap intervals; with `reference`, the others also get
    "minus_reference" {"value", "low", "high"} from the same resamples (paired). groups: [n] resampled whole where given."""
    rng = np.random.default_rng(seed)
    _, group = np.unique(np.arange(len(target)) if groups is None else groups, return_inverse=True)
    order = np.argsort(group, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(group))[:-1])
    sampled = {name: np.empty(draws) for name in scores}
    for b in range(draws):
        pick = rng.integers(len(parts), size=len(parts))
        rows = pick if len(parts) == len(target) and groups is None else np.concatenate([parts[p] for p in pick])
        for name, score in scores.items():
            sampled[name][b] = measure(score[rows], target[rows])

    def summary(value: float, drawn: np.ndarray) -> dict:
        low, high = np.quantile(drawn, [0.025, 0.975]) if draws else (np.nan, np.nan)
        return {"value": value, "low": float(low), "high": float(high)}

    out = {name: {**summary(measure(s, target), sampled[name]), "n": len(target)} for name, s in scores.items()}
    for name in scores:
        if reference in scores and name != reference:
            difference = out[name]["value"] - out[reference]["value"]
            out[name]["minus_reference"] = summary(difference, sampled[name] - sampled[reference])
    return out


def calibrate(score: np.ndarray, target: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A map from scores to [0, 1] that keeps their order: sigmoid(a score + b) with a >= 0 that maximises the likelihood of
    `target` in [0, 1] (Platt scaling with soft labels). Scores that go against the target give a constant."""
    centre, scale = float(np.mean(score)), float(np.std(score)) or 1.0
    z, (a, b) = (np.asarray(score) - centre) / scale, (0.0, float(logit(np.clip(np.mean(target), 1e-3, 1 - 1e-3))))
    for _ in range(50):  # Newton's method; a pinch of curvature keeps separable data finite
        p = expit(a * z + b)
        curvature = np.maximum(p * (1 - p), 1e-6)
        hessian = np.array([[(curvature * z * z).sum() + 1e-2, (curvature * z).sum()], [(curvature * z).sum(), curvature.sum() + 1e-2]])
        move = np.linalg.solve(hessian, [(z * (target - p)).sum() - 1e-2 * a, (target - p).sum()])
        move *= min(1.0, 2.0 / max(np.abs(move).max(), 1e-12))
        a, b = a + move[0], b + move[1]
        if np.abs(move).max() < 1e-9:
            break
    if a <= 0:
        a, b = 0.0, float(logit(np.clip(np.mean(target), 1e-3, 1 - 1e-3)))
    return lambda new: expit(a * (np.asarray(new) - centre) / scale + b)
