"""Which prompts go into which training step.

A schedule answers `batch(step)` with row indices into the prompt list it was built for. Offline schedules are pure
functions of their construction arguments; `TrainabilityBand` (in `trainability.py`, exported here too) also learns from
the pass rates that `observe` brings, and then `batch` is a pure function of (construction arguments, state).

Promises of every offline schedule, whatever its kind:
  * the stream of batches is the concatenation of epochs, and an epoch holds each kept row exactly once;
  * every batch has exactly `batch_size` rows: when an epoch's length is no multiple of it, the last batch of the epoch is
    filled up from the head of the next one, and never with a row that it already holds;
  * each epoch draws its own randomness from (seed, epoch), so an order is fresh and any step can be asked for directly.

Kinds. `published` is the order of SAERL (arXiv 2605.27354) as methods notes 5.3 read it: clusters, easy to hard inside a
cluster, batches of one cluster that alternate, and the last `rho` share of a batch swapped with the first of the next.
The others are its controls: `shuffled`, `global_sort`, `reversed`, `round_robin`, `dirichlet`, `e2h_gaussian`
(arXiv 2506.06632), `random_clusters`, and `soft`, a noisy easy-to-hard order that keeps easy rows in every batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jaxrl_llm.curation.orders import ALLOWED, KINDS, Order, Signals
from jaxrl_llm.curation.trainability import TrainabilityBand, reduce_features
from jaxrl_llm.errors import UserError

__all__ = [
    "KINDS",
    "OfflineSchedule",
    "Schedule",
    "Signals",
    "TrainabilityBand",
    "make_schedule",
    "random_clusters",
    "reduce_features",
]


class Schedule(Protocol):
    """What the trainer needs: see the module's docstring."""

    def batch(self, step: int) -> np.ndarray: ...

    def observe(self, step: int, indices: np.ndarray, pass_rates: np.ndarray) -> None: ...

    def state(self) -> dict[str, np.ndarray]: ...

    def restore(self, state: dict[str, np.ndarray]) -> None: ...


class OfflineSchedule:
    """Batches cut from a stream of epochs; see the module's docstring for the promises.

    rows: [N] the row indices to use (the kept ones). order(rng, sizes, signals) -> permutation of range(N), where `sizes`
    are the lengths of the pieces that the epoch's batches take from it: a head that completes the batch before (if any),
    whole batches, and an incomplete last one (if any).
    """

    def __init__(self, rows: np.ndarray, signals: Signals, order: Order, batch_size: int, seed: int):
        if not 1 <= batch_size <= len(rows):
            raise UserError(
                f"schedule: batch_size is {batch_size} but there are {len(rows)} kept prompts; "
                "take a batch_size from 1 to that number, or drop fewer prompts"
            )
        self.rows, self.batch_size, self.seed = np.asarray(rows), int(batch_size), int(seed)
        self._signals, self._order = signals, order
        self._tails: list[np.ndarray] = []  # rows of epoch e that share their batch with epoch e + 1
        self._cache: dict[int, np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> float:
        return len(self.rows) / self.batch_size

    def _permutation(self, epoch: int) -> np.ndarray:
        """Positions in `rows` in the order of this epoch. Epochs are linked only through the batch that two of them share,
        so the tails are worked out from the first epoch on and kept; everything else is drawn from (seed, epoch)."""
        if epoch in self._cache:
            return self._cache[epoch]
        n, size = len(self.rows), self.batch_size
        while len(self._tails) < epoch and n % size:
            self._permutation(len(self._tails))
        head = -(epoch * n) % size
        sizes = [head] * (head > 0) + [size] * ((n - head) // size)
        sizes += [n - sum(sizes)] * (n > sum(sizes))
        perm = np.array(self._order(np.random.default_rng([self.seed, epoch]), sizes, self._signals))
        if head:
            _keep_out_of_head(perm, head, self._tails[epoch - 1])
        if n % size and len(self._tails) == epoch:
            self._tails.append(perm[n - (n - head) % size :])
        self._cache = {e: p for e, p in self._cache.items() if e >= epoch - 1} | {epoch: perm}
        return perm

    def batch(self, step: int) -> np.ndarray:
        """[batch_size] row indices of training step `step` (from 0)."""
        if step < 0:
            raise UserError(f"schedule: step is {step}; steps count from 0")
        n = len(self.rows)
        first, last = step * self.batch_size, (step + 1) * self.batch_size
        parts = []
        while first < last:
            epoch, offset = divmod(first, n)
            parts.append(self._permutation(epoch)[offset : offset + last - first])
            first += len(parts[-1])
        return self.rows[np.concatenate(parts)]

    def observe(self, step: int, indices: np.ndarray, pass_rates: np.ndarray) -> None:
        """Offline schedules do not learn."""

    def state(self) -> dict[str, np.ndarray]:
        return {}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        if state:
            raise UserError(f"schedule: this one keeps no state, but the checkpoint holds {sorted(state)} of another kind")


def _keep_out_of_head(perm: np.ndarray, head: int, taken: np.ndarray) -> None:
    """Swap rows of `taken` (in the shared batch already) out of perm[:head] for the nearest later ones, in place."""
    clash = np.flatnonzero(np.isin(perm[:head], taken))
    if len(clash):
        free = head + np.flatnonzero(~np.isin(perm[head:], taken))[: len(clash)]
        perm[clash], perm[free] = perm[free], perm[clash]


def random_clusters(n: int, k: int, seed: int = 0) -> np.ndarray:
    """[n] labels 0..k-1 of a random partition into groups of equal size (up to one)."""
    return np.random.default_rng([seed, n, k]).permutation(np.arange(n) % k)


def make_schedule(
    kind: str,
    *,
    batch_size: int,
    seed: int = 0,
    difficulty: np.ndarray,
    cluster: np.ndarray | None = None,
    keep: np.ndarray | None = None,
    **options,
) -> OfflineSchedule:
    """Build an offline schedule over N rows.

    kind: a name of KINDS. difficulty: [N], higher is harder. cluster: [N] int; None puts all rows into one. keep: [N] bool;
    None keeps all. options: those of the kind (`published`: rho, within, alternate; `soft`: temperature, easy_floor,
    easy_quantile, by_cluster; `dirichlet`: alpha, within; `round_robin`: within, share; `e2h_gaussian`: buckets, sigma,
    power, floor). Raises UserError for an unknown kind or option, or for more rows a batch than rows.
    """
    if kind not in KINDS:
        raise UserError(f"schedule: no kind {kind!r}; one of {', '.join(sorted(KINDS))}")
    order = KINDS[kind]
    source = KINDS["published"] if kind == "random_clusters" else order
    known = [p.name for p in inspect.signature(source).parameters.values() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"schedule {kind!r}: no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    for name, value in options.items():
        allowed = ALLOWED.get(name)
        if allowed and (value not in allowed if isinstance(allowed[0], str) else not allowed[0] <= value <= allowed[1]):
            raise UserError(
                f"schedule {kind!r}: {name} is {value!r}; "
                + (f"one of {', '.join(map(str, allowed))}" if isinstance(allowed[0], str) else f"from {allowed[0]:g} to {allowed[1]:g}")
            )
    difficulty = np.asarray(difficulty, dtype=float)
    n = len(difficulty)
    cluster = np.zeros(n, dtype=int) if cluster is None else np.asarray(cluster)
    rows = np.arange(n) if keep is None else np.flatnonzero(keep)
    if len(cluster) != n or (keep is not None and len(keep) != n):
        raise UserError(f"schedule: difficulty has {n} rows; cluster and keep must have as many")
    if not np.isfinite(difficulty[rows]).all():
        raise UserError(f"schedule: difficulty of row {rows[~np.isfinite(difficulty[rows])][0]} is not a number")

    def bound(rng: np.random.Generator, sizes: Sequence[int], signals: Signals) -> np.ndarray:
        return order(rng, sizes, signals, **options)

    return OfflineSchedule(rows, Signals(cluster[rows], difficulty[rows]), bound, batch_size, seed)
