"""A schedule that moves with the policy: train on the prompts that it can learn from now.

GRPO learns nothing from a prompt whose samples all pass or all fail; the variance of its advantages grows with p (1 - p),
p the policy's current pass probability. `TrainabilityBand` keeps an estimate of every prompt's p and favours those near the
middle, while a share of every batch stays with easy prompts (a strict easy-to-hard pass forgets them) and clusters stay
balanced. The estimate is an online logistic regression on the prompts' feature vectors,

    logit p_i = logit(prior_i) + x_i . w + b_i ,      x_i = (1, logit(prior_i) - mean, features_i),

updated after each step to the posterior mode of the step's pass counts plus a quadratic memory of all earlier ones that fades
by `forgetting` a step (an extended Kalman filter in information form; its linear cousin is recursive least squares). The
fading goes towards the prior precision, so directions that no prompt excites stay bounded. b_i, prompt i's own deviation, is
a one-dimensional filter of the same form, so that a prompt seen before is judged by its own record too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import expit, logit
from threadpoolctl import ThreadpoolController

from jaxrl_llm.errors import UserError

NEWTON_STEPS = 5
MAX_MOVE = 2.0  # logits a Newton step
ITEM_FORGETTING = 0.5  # what a prompt's own record keeps from its visit before
BALANCES = ("items", "utility", "equal", "none")
UTILITIES = ("variance", "mixed_group")


def reduce_features(features, dims: int = 64, seed: int = 0) -> np.ndarray:
    """[N, D] dense or sparse -> [N, min(dims, D, N - 1)] float32: truncated SVD, centred, mean squared row norm 1."""
    from sklearn.decomposition import TruncatedSVD

    dims = min(dims, features.shape[1], max(features.shape[0] - 1, 1))
    if features.shape[1] > dims:
        x = TruncatedSVD(dims, random_state=seed).fit_transform(features)
    else:
        x = features.toarray() if sparse.issparse(features) else np.array(features, dtype=float)
    x = x - x.mean(axis=0)
    scale = np.sqrt(np.square(x).sum(axis=1).mean())
    return (x / (scale if scale > 0 else 1.0)).astype(np.float32)


class TrainabilityBand:
    """Adaptive schedule over N prompts; see the module's docstring for the estimate.

    prior_pass: [N] expected pass probability before training (1 - difficulty). features: [N, D] reduced vectors (see
    `reduce_features`) or None for no regression on them. cluster: [N] int. quality: [N] weights >= 0 or None.
    keep: [N] bool or None.

    A batch is drawn without replacement within an epoch: `easy_floor` of it from the easiest prompts left (those with
    p >= easy_above, or the easiest there are), the rest with probability growing with utility(p)^(1 / temperature) *
    quality^quality_power, `balance`d over clusters (quotas by the "items" left in each, by their summed "utility", "equal",
    or "none"). utility: "variance" 4 p (1 - p), or "mixed_group" the probability that `samples_per_prompt` samples are not
    all equal. The epoch ends when `epoch_share` of its prompts are drawn: below 1, the least useful ones are passed over
    until the next. A batch on the border of two epochs takes what is left of the one and fills up from the other, never
    with the same prompt twice. learn=False keeps the prior estimate (a fixed band).

    Call `batch(step)`, roll out, `observe(step, indices, pass_rates)`, then `batch(step + 1)`: each step once, in order.
    NaN pass rates (prompts whose rewards failed) count as drawn and teach nothing. `state()` after `observe` holds
    everything that the next batch depends on; restoring it continues bit for bit.

    refilter: policy parameters -> keep [N] bool. A policy that has learnt tells sound answers from wrong ones better than the
    one that training began with, so `see_policy` asks for the rows to keep anew before every `refilter_every`-th
    training step.
    """

    def __init__(
        self,
        prior_pass: np.ndarray,
        features: np.ndarray | None,
        batch_size: int,
        *,
        seed: int = 0,
        cluster: np.ndarray | None = None,
        quality: np.ndarray | None = None,
        keep: np.ndarray | None = None,
        samples_per_prompt: int = 8,
        temperature: float = 0.5,
        easy_floor: float = 0.125,
        easy_above: float = 0.75,
        balance: str = "items",
        utility: str = "variance",
        quality_power: float = 1.0,
        epoch_share: float = 1.0,
        forgetting: float = 0.98,
        ridge: float = 1.0,
        item_scale: float = 0.5,
        learn: bool = True,
        refilter: Callable[[Any], np.ndarray] | None = None,
        refilter_every: int = 40,
    ):
        prior = np.asarray(prior_pass, dtype=np.float64)
        n = len(prior)
        for name, value in (("features", features), ("cluster", cluster), ("quality", quality), ("keep", keep)):
            if value is not None and len(value) != n:
                raise UserError(f"TrainabilityBand: prior_pass has {n} prompts, {name} has {len(value)}")
        if not ((prior >= 0) & (prior <= 1)).all():
            raise UserError("TrainabilityBand: prior_pass must lie in [0, 1] and hold no NaN")
        if balance not in BALANCES or utility not in UTILITIES:
            raise UserError(f"TrainabilityBand: balance is one of {BALANCES}, utility one of {UTILITIES}")
        if not (temperature > 0 and 0 <= easy_floor <= 1 and 0 < epoch_share <= 1 and 0 < forgetting <= 1 and ridge > 0):
            raise UserError("TrainabilityBand: temperature and ridge must be above 0, easy_floor in [0, 1], epoch_share and forgetting in (0, 1]")
        self.n, self.batch_size, self.seed = n, int(batch_size), int(seed)
        self.samples, self.temperature = int(samples_per_prompt), temperature
        self.easy_floor, self.easy_above = easy_floor, easy_above
        self.balance, self.utility, self.learn = balance, utility, learn
        self.forgetting, self.ridge, self.item_scale = forgetting, ridge, item_scale
        self._refilter, self.refilter_every = refilter, refilter_every

        kept = np.ones(n, bool) if keep is None else np.array(keep, bool)
        self.epoch_share = epoch_share
        length = int(round(epoch_share * kept.sum()))
        if not 1 <= self.batch_size <= length:
            raise UserError(
                f"TrainabilityBand: batch_size is {batch_size} but an epoch has {length} prompts "
                f"({kept.sum()} kept x epoch_share {epoch_share:g})"
            )
        self._cluster = np.zeros(n, int) if cluster is None else np.unique(np.asarray(cluster), return_inverse=True)[1]
        self._n_clusters = int(self._cluster.max()) + 1
        weight = np.ones(n) if quality is None else np.asarray(quality, float)
        self._log_quality = quality_power * np.log(np.maximum(weight, 1e-9))

        self._prior_logit = logit(np.clip(prior, 0.02, 0.98))
        centred = self._prior_logit - self._prior_logit.mean()
        columns = [np.ones((n, 1)), centred[:, None]] + ([] if features is None else [np.asarray(features)])
        self._x = np.concatenate(columns, axis=1).astype(np.float32)
        dims = self._x.shape[1]
        self._state = {
            "step": np.zeros((), np.int64),
            "drawn": np.zeros((), np.int64),  # prompts drawn in the current epoch
            "used": np.zeros(n, bool),
            "kept": kept,
            "weights": np.zeros(dims, np.float64),
            "precision": ridge * np.eye(dims, dtype=np.float64),
            "item_offset": np.zeros(n, np.float64),
            "item_precision": np.zeros(n, np.float64),
        }
        self._cached: tuple[int, np.ndarray, np.ndarray, int] | None = None
        # One BLAS thread: the matrices are small, threads of a busy machine cost 50 times what they save, and sums
        # must not depend on how many there are.
        self._blas = ThreadpoolController()

    # ----------------------------------------------------------------------------------------------- the estimate

    def pass_probability(self) -> np.ndarray:
        """[N] the current estimate of every prompt's pass probability."""
        shared = self._x @ self._state["weights"].astype(np.float32)
        return expit(self._prior_logit + shared + self._state["item_offset"])

    def _utility(self, p: np.ndarray) -> np.ndarray:
        if self.utility == "variance":
            return 4 * p * (1 - p)
        return 1 - p**self.samples - (1 - p) ** self.samples

    # ----------------------------------------------------------------------------------------------------- drawing

    def batch(self, step: int) -> np.ndarray:
        """[batch_size] row indices. Raises UserError when `step` is not the next one to be observed."""
        return self._draw(step)[1].copy()

    def _draw(self, step: int) -> tuple[int, np.ndarray, np.ndarray, int]:
        """(step, rows, `used` afterwards, `drawn` afterwards); kept until the state changes."""
        state = self._state
        if step != int(state["step"]):
            raise UserError(
                f"TrainabilityBand: batch({step}) was asked for, but the next step is {int(state['step'])}: "
                "call observe() for each step in order, or restore() the state saved at that step"
            )
        if self._cached is None:
            rng = np.random.default_rng([self.seed, step])
            with self._blas.limit(limits=1, user_api="blas"):
                p = self.pass_probability()
            used, drawn = state["used"].copy(), int(state["drawn"])
            open_rows = state["kept"] & ~used
            # Rows that are kept no more since a refilter may leave fewer open ones than the epoch still wants: then it ends here.
            left = min(max(int(round(self.epoch_share * state["kept"].sum())) - drawn, 0), int(open_rows.sum()))
            first = self._pick(rng, p, open_rows, min(self.batch_size, left))
            used[first] = True
            drawn += len(first)
            rows = first
            if len(rows) < self.batch_size:
                used = np.zeros(self.n, bool)
                open_rows = state["kept"].copy()
                open_rows[first] = False
                second = self._pick(rng, p, open_rows, self.batch_size - len(first))
                used[second] = True
                drawn, rows = len(second), np.concatenate([first, second])
            self._cached = (step, rows, used, drawn)
        return self._cached

    def _pick(self, rng: np.random.Generator, p: np.ndarray, open_mask: np.ndarray, size: int) -> np.ndarray:
        """`size` different rows of `open_mask`."""
        if size == 0:
            return np.empty(0, int)
        open_rows = np.flatnonzero(open_mask)
        p = p[open_rows]
        # Log-weight plus Gumbel noise: its largest values are a weighted draw without replacement.
        score = np.log(self._utility(p) + 1e-9) / self.temperature + self._log_quality[open_rows]
        keys = score + rng.gumbel(size=len(open_rows))
        easy = self._easiest(rng, p, min(int(round(self.easy_floor * size)), size))
        keys[easy] = np.inf  # these are in; they count towards their cluster's quota
        if self.balance == "none":
            return open_rows[np.argsort(-keys, kind="stable")[:size]]
        cluster = self._cluster[open_rows]
        quota = self._quotas(rng, cluster, score, size)
        quota = np.maximum(quota, np.bincount(cluster[easy], minlength=self._n_clusters))
        order = np.lexsort((-keys, cluster))
        starts = np.searchsorted(cluster[order], np.arange(self._n_clusters))
        rank = np.empty(len(order), int)
        rank[order] = np.arange(len(order)) - starts[cluster[order]]
        # Inside the quota first; easy rows can push a quota up, then the least useful of the others give way.
        outside = rank >= quota[cluster]
        return open_rows[np.lexsort((-keys, outside))[:size]]

    def _easiest(self, rng: np.random.Generator, p: np.ndarray, count: int) -> np.ndarray:
        """Positions of `count` random rows with p >= easy_above, made up with the easiest others where these are too few."""
        shuffled = rng.permutation(len(p))
        return shuffled[np.argsort(-np.minimum(p[shuffled], self.easy_above), kind="stable")[:count]]

    def _quotas(self, rng: np.random.Generator, cluster: np.ndarray, score: np.ndarray, size: int) -> np.ndarray:
        """Rows a cluster gives to this batch: sums to `size`, fractions rounded at random, never above what it has left."""
        left = np.bincount(cluster, minlength=self._n_clusters)
        if self.balance == "items":
            share = left.astype(float)
        elif self.balance == "utility":
            share = np.bincount(cluster, np.exp(score - score.max()), minlength=self._n_clusters) + 1e-12 * (left > 0)
        else:
            share = (left > 0).astype(float)
        quota = np.zeros(self._n_clusters, int)
        while (short := size - quota.sum()) > 0:
            share = np.where(quota < left, share, 0.0)
            # Systematic rounding: each quota is the floor or the ceiling of its fair part.
            edges = np.minimum(np.floor(short * np.cumsum(share) / share.sum() + rng.random()), short)
            edges[-1] = short
            extra = np.diff(edges, prepend=0.0).astype(int)
            quota = np.minimum(quota + extra, left)
        return quota

    # ---------------------------------------------------------------------------------------------------- learning

    def see_policy(self, step: int, params: Any) -> None:
        """Shown the policy that training step `step` will sample from, before its first batch: the rows to keep are chosen anew where it is
        time. A training step may take several batches, so its number is not that of `batch`."""
        if self._refilter is None or step == 0 or step % self.refilter_every:
            return
        kept = np.asarray(self._refilter(params), bool)
        if kept.shape != (self.n,) or kept.sum() < self.batch_size:
            raise UserError(f"TrainabilityBand: refilter kept {kept.sum()} of {kept.size} prompts; a batch of {self.batch_size} needs more")
        self._state["kept"], self._cached = kept, None

    def observe(self, step: int, indices: np.ndarray, pass_rates: np.ndarray) -> None:
        """Tell the pass rates [K] in [0, 1] (NaN: unknown) of the rows `indices` [K] that were rolled out at `step`."""
        _, _, used, drawn = self._draw(step)
        indices, rates = np.asarray(indices, int), np.asarray(pass_rates, np.float64)
        if indices.shape != rates.shape:
            raise UserError(f"TrainabilityBand: observe got {indices.shape} indices and {rates.shape} pass rates")
        known = np.isfinite(rates)
        if ((rates[known] < 0) | (rates[known] > 1)).any():
            raise UserError("TrainabilityBand: pass rates must lie in [0, 1]")
        if self.learn and known.any():
            with self._blas.limit(limits=1, user_api="blas"):
                self._learn(indices[known], rates[known])
        self._state.update(used=used, drawn=np.int64(drawn), step=np.int64(step + 1))
        self._cached = None

    def _learn(self, rows: np.ndarray, rates: np.ndarray) -> None:
        """Posterior mode after these pass counts, first of the shared weights, then of the rows' own deviations."""
        state, x = self._state, self._x[rows].astype(np.float64)
        own = state["item_offset"][rows]
        memory = self.forgetting * state["precision"]
        memory[np.diag_indices_from(memory)] += (1 - self.forgetting) * self.ridge
        pull = (1 - self.forgetting) * self.ridge * state["weights"]
        start = weights = state["weights"]
        for _ in range(NEWTON_STEPS):
            p = expit(self._prior_logit[rows] + own + x @ weights)
            slope = self.samples * x.T @ (rates - p) - memory @ (weights - start) - pull
            precision = memory + x.T @ (self._curvature(p)[:, None] * x)
            move = np.linalg.solve(precision, slope)
            # A logit moves by at most MAX_MOVE at a time: a prior that is far off must not overshoot.
            weights = weights + move * min(1.0, MAX_MOVE / max(np.abs(x @ move).max(), 1e-12))
        state["weights"], state["precision"] = weights, precision
        if self.item_scale <= 0:
            return
        prior = 1 / self.item_scale**2
        memory = ITEM_FORGETTING * state["item_precision"][rows]
        start, base = own, self._prior_logit[rows] + x @ weights
        for _ in range(NEWTON_STEPS):
            p = expit(base + own)
            slope = self.samples * (rates - p) - (prior + memory) * (own - start) - (1 - ITEM_FORGETTING) * prior * start
            curvature = memory + self._curvature(p)
            own = own + np.clip(slope / (prior + curvature), -MAX_MOVE, MAX_MOVE)
        for name, value in (("item_offset", own), ("item_precision", curvature)):
            state[name] = state[name].copy()
            state[name][rows] = value

    def _curvature(self, p: np.ndarray) -> np.ndarray:
        """Information of `samples` draws about a logit, kept above that of p = 0.01."""
        return self.samples * np.maximum(p * (1 - p), 0.01)

    # ------------------------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, np.ndarray]:
        """Everything that changes: a dict of arrays, all of fixed shape, for the checkpoint."""
        return {name: np.array(value) for name, value in self._state.items()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Continue from `state()`. Raises UserError when it belongs to other prompts or features."""
        if set(state) != set(self._state):
            raise UserError(f"TrainabilityBand: the saved state holds {sorted(state)}, not {sorted(self._state)}")
        for name, mine in self._state.items():
            if np.shape(state[name]) != np.shape(mine):
                raise UserError(
                    f"TrainabilityBand: saved {name} has shape {np.shape(state[name])}, this schedule needs {np.shape(mine)}: "
                    "it was saved for other prompts or features"
                )
        self._state = {name: np.array(state[name], dtype=np.asarray(mine).dtype) for name, mine in self._state.items()}
        self._cached = None
