"""The order of one epoch: each kind is a function (rng, batch sizes of the epoch, signals, options) -> permutation of the rows.

`schedule.OfflineSchedule` calls one of them for each epoch. The batch sizes are the lengths of the pieces that the epoch's batches
take from it: a head that completes the batch before (if any), whole batches, an incomplete last one (if any).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Signals:
    """Per-row signals of the rows to be ordered: `cluster` [N] int, `difficulty` [N] float, higher is harder."""

    cluster: np.ndarray
    difficulty: np.ndarray


Order = Callable[[np.random.Generator, Sequence[int], Signals], np.ndarray]


def _ranked(rng: np.random.Generator, signals: Signals, rows: np.ndarray, within: str) -> np.ndarray:
    """`rows` in the order asked for; ties of difficulty fall at random."""
    noise = rng.random(len(rows))
    if within == "shuffled":
        return rows[np.argsort(noise)]
    sign = {"easy_to_hard": 1.0, "hard_to_easy": -1.0}[within]
    return rows[np.lexsort((noise, sign * signals.difficulty[rows]))]


def _queues(rng: np.random.Generator, signals: Signals, within: str) -> list[np.ndarray]:
    """One ordered array of rows for each cluster."""
    return [_ranked(rng, signals, np.flatnonzero(signals.cluster == c), within) for c in np.unique(signals.cluster)]


def _shuffled(rng, sizes, signals) -> np.ndarray:
    return rng.permutation(len(signals.difficulty))


def _global_sort(rng, sizes, signals, *, within: str = "easy_to_hard") -> np.ndarray:
    return _ranked(rng, signals, np.arange(len(signals.difficulty)), within)


def _reversed(rng, sizes, signals) -> np.ndarray:
    return _global_sort(rng, sizes, signals, within="hard_to_easy")


def _round_robin(rng, sizes, signals, *, within: str = "easy_to_hard", share: str = "equal") -> np.ndarray:
    """Every batch draws from all clusters: one row each in turn ("equal", until a cluster is used up), or each cluster in
    proportion to its size so that all of them end together ("proportional")."""
    rows, times, tiebreak = [], [], []
    for queue in _queues(rng, signals, within):
        rounds = np.arange(len(queue))
        rows.append(queue)
        times.append(rounds if share == "equal" else (rounds + rng.random()) / len(queue))
        tiebreak.append(rng.random(len(queue)))
    return np.concatenate(rows)[np.lexsort((np.concatenate(tiebreak), np.concatenate(times)))]


def _draw_counts(rng: np.random.Generator, need: int, weights: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """Multinomial counts that sum to `need` and never exceed `remaining`."""
    counts = np.zeros(len(remaining), dtype=int)
    while need > 0:
        room = remaining - counts
        weight = np.where(room > 0, weights + 1e-12, 0.0)
        counts += np.minimum(rng.multinomial(need, weight / weight.sum()), room)
        need -= counts.sum() - (remaining - room).sum()
    return counts


def _draw_from_queues(rng, sizes, queues: list[np.ndarray], weights_of: Callable[..., np.ndarray]) -> np.ndarray:
    """Fill each batch with the next rows of the queues, in random proportions `weights_of(batch number, rows left [M])`."""
    used = np.zeros(len(queues), dtype=int)
    lengths = np.array([len(q) for q in queues])
    batches = []
    for t, size in enumerate(sizes):
        counts = _draw_counts(rng, size, weights_of(t, lengths - used), lengths - used)
        drawn = [q[u : u + c] for q, u, c in zip(queues, used, counts, strict=True)]
        batches.append(rng.permutation(np.concatenate(drawn)))
        used += counts
    return np.concatenate(batches)


def _dirichlet(rng, sizes, signals, *, alpha: float = 0.5, within: str = "easy_to_hard") -> np.ndarray:
    """Each batch's cluster proportions are drawn from Dirichlet(alpha): small alpha, few clusters a batch."""
    queues = _queues(rng, signals, within)
    return _draw_from_queues(rng, sizes, queues, lambda t, left: rng.dirichlet(np.full(len(queues), alpha)))


def _e2h_gaussian(rng, sizes, signals, *, buckets: int = 5, sigma: float = 0.5, power: float = 0.5, floor: float = 0.0):
    """E2H Reasoner's Gaussian schedule (arXiv 2506.06632) with each row once: difficulty buckets i = 0..M-1; at time t of T
    the bucket is drawn with p_i = floor + (1 - M floor) q_i, q_i ~ exp(-(i - mu)^2 / 2 sigma^2), mu = (t/T)^power (M - 1).

    The published sampler draws with replacement and passes the buckets' sizes by. Here time is one epoch and p is scaled by
    row and column (iterative proportional fitting) until every bucket is used up exactly at the epoch's end.
    """
    order = _global_sort(rng, sizes, signals)
    queues = [rng.permutation(part) for part in np.array_split(order, min(buckets, len(order)))]
    time, index = np.linspace(0, 1, len(sizes))[:, None], np.arange(len(queues))
    q = np.exp(-((index - time**power * (len(queues) - 1)) ** 2) / (2 * sigma**2)) + 1e-12
    plan = floor + max(1 - len(queues) * floor, 0.0) * q / q.sum(axis=1, keepdims=True)
    for _ in range(100):
        plan *= np.array([len(queue) for queue in queues]) / plan.sum(axis=0)
        plan *= np.array(sizes)[:, None] / plan.sum(axis=1, keepdims=True)
    to_come = np.cumsum(plan[::-1], axis=0)[::-1]
    return _draw_from_queues(rng, sizes, queues, lambda t, left: plan[t] * left / to_come[t])  # chance must not add up


def _published(rng, sizes, signals, *, rho: float = 0.125, within: str = "easy_to_hard", alternate: str = "parallel") -> np.ndarray:
    """Batches of one cluster, easy to hard inside the cluster, clusters alternating, tails of neighbours swapped.

    Rows of a cluster that do not fill a batch are put together with those of other clusters (few clusters to a batch).
    `alternate`: "parallel" moves all clusters forward at the same pace, relative to their size; "cycle" visits each
    cluster once a cycle in random order, so that small clusters are done early.
    """
    quantile = np.empty(len(signals.difficulty))
    queues = _queues(rng, signals, within)
    for queue in queues:
        quantile[queue] = (np.arange(len(queue)) + 0.5) / len(queue)

    # The head of the epoch (it completes the last batch of the epoch before) comes from one cluster as far as it reaches.
    size = max(sizes)
    head_size = sizes[0] if sizes[0] < size else 0
    head = []
    for q in rng.permutation(len(queues)):
        taken, queues[q] = np.split(queues[q], [head_size - sum(map(len, head))])
        head.append(taken)
    full, cycle, time, rest = [], [], [], []
    for queue in queues:
        whole = len(queue) // size
        full += np.split(queue[: whole * size], whole) if whole else []
        cycle += range(whole)
        # One random shift a cluster, within a batch's width, so that epochs differ and a cluster's own order stays.
        shift = (rng.random() - 0.5) * size / max(len(queue), size)
        time += [quantile[queue[i * size : (i + 1) * size]].mean() + shift for i in range(whole)]
        rest.append(queue[whole * size :])

    # What is left over, like with like; the last of it is the epoch's incomplete batch.
    rest = [r for r in rest if len(r)]
    rest.sort(key=lambda r: quantile[r].mean() + 0.05 * rng.random())
    left = np.concatenate(rest) if rest else np.empty(0, dtype=int)
    whole = len(left) // size
    full += np.split(left[: whole * size], whole) if whole else []
    cycle += [max(cycle, default=0) + 1] * whole
    time += [quantile[b].mean() for b in full[len(time) :]]
    tail = left[whole * size :]

    key = np.array(cycle) + rng.random(len(full)) if alternate == "cycle" else time
    batches = [np.concatenate(head)] if head_size else []
    batches += [full[i] for i in _no_repeats(np.argsort(key), [signals.cluster[b[0]] for b in full])]
    batches += [tail] if len(tail) else []
    batches = [_ranked(rng, signals, b, within) for b in batches]
    _swap_tails(batches, round(rho * size))
    return np.concatenate(batches)


def _no_repeats(order: Sequence[int], label: Sequence[int]) -> list[int]:
    """`order` with as few neighbours of equal label as moving the next other one forward allows."""
    waiting, out = list(order), []
    while waiting:
        nxt = next((i for i, b in enumerate(waiting[:64]) if not out or label[b] != label[out[-1]]), 0)
        out.append(waiting.pop(nxt))
    return out


def _swap_tails(batches: list[np.ndarray], m: int) -> None:
    """Exchange the last m rows of each batch with the first m of the next, in place."""
    for a, b in zip(batches[:-1], batches[1:]):
        k = min(m, len(a) // 2, len(b) // 2)
        if k:
            a[-k:], b[:k] = b[:k].copy(), a[-k:].copy()


def _random_clusters_order(rng, sizes, signals, **options) -> np.ndarray:
    """`published` with the cluster labels dealt out at random: same sizes of clusters, no meaning."""
    return _published(rng, sizes, Signals(rng.permutation(signals.cluster), signals.difficulty), **options)


def _soft(
    rng,
    sizes,
    signals,
    *,
    temperature: float = 0.2,
    easy_floor: float = 0.125,
    easy_quantile: float = 1 / 3,
    by_cluster: bool = True,
) -> np.ndarray:
    """A curriculum that does not forget: rows go by (difficulty quantile + temperature * normal noise), and every batch gets
    `easy_floor` of its rows from the easiest `easy_quantile` of all. With `by_cluster` the quantile is taken inside the
    cluster, so that all clusters advance together and a batch mirrors the clusters' sizes."""
    n = len(signals.difficulty)
    overall = np.empty(n)
    overall[_global_sort(rng, sizes, signals)] = (np.arange(n) + 0.5) / n
    quantile = overall.copy()
    if by_cluster:
        for queue in _queues(rng, signals, "easy_to_hard"):
            quantile[queue] = (np.arange(len(queue)) + 0.5) / len(queue)
    reserve_sizes = [int(np.ceil(easy_floor * size - 1e-9)) for size in sizes]
    easy = rng.permutation(np.flatnonzero(overall <= easy_quantile))
    reserve = easy[: sum(reserve_sizes)]
    # If the easy rows do not reach, every batch gets its even share of those there are.
    cuts = np.round(np.cumsum(reserve_sizes) * len(reserve) / max(sum(reserve_sizes), 1)).astype(int)
    open_rows = np.setdiff1d(np.arange(n), reserve)
    open_rows = open_rows[np.argsort(quantile[open_rows] + temperature * rng.standard_normal(len(open_rows)))]
    batches, start = [], 0
    for size, easy_part in zip(sizes, np.split(reserve, cuts[:-1]), strict=True):
        end = start + size - len(easy_part)
        batches.append(rng.permutation(np.concatenate([easy_part, open_rows[start:end]])))
        start = end
    return np.concatenate(batches)


KINDS: dict[str, Callable[..., np.ndarray]] = {
    "published": _published,
    "shuffled": _shuffled,
    "global_sort": _global_sort,
    "reversed": _reversed,
    "round_robin": _round_robin,
    "dirichlet": _dirichlet,
    "e2h_gaussian": _e2h_gaussian,
    "random_clusters": _random_clusters_order,
    "soft": _soft,
}


# What an option may be: a tuple of names, or the ends of a closed range.
WITHIN = ("easy_to_hard", "hard_to_easy", "shuffled")
ALLOWED: dict[str, tuple[str, ...] | tuple[float, float]] = {
    "within": WITHIN,
    "alternate": ("parallel", "cycle"),
    "share": ("equal", "proportional"),
    "rho": (0.0, 0.5),
    "alpha": (1e-3, 1e6),
    "temperature": (0.0, float("inf")),
    "easy_floor": (0.0, 1.0),
    "easy_quantile": (0.0, 1.0),
    "buckets": (1, 1_000_000),
    "sigma": (1e-3, float("inf")),
    "power": (0.0, float("inf")),
    "floor": (0.0, 1.0),
}
