"""Lloyd's k-means, jit-compiled, chunked over points and shardable over devices.

Equal to scikit-learn's `KMeans(algorithm="lloyd")` from the same initial centres: the same stopping rules, the same
relocation of empty clusters, the same centring of dense data. Letters: N points, D features, K clusters.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jaxtyping import Array, Float

from sae.errors import SAEError
from sae.points import Pass, Points
from sae.sparse_points import SparsePoints


class KMeans(NamedTuple):
    """centers [K, D] fp32, labels [N] int32, inertia: sum of squared distances to the assigned centre."""

    centers: np.ndarray
    labels: np.ndarray
    inertia: float


def kmeans(
    x: Any,
    k: int,
    *,
    init: str | np.ndarray = "k-means++",
    seed: int = 0,
    n_init: int = 1,
    max_iter: int = 100,
    tol: float = 1e-4,
    spherical: bool = False,
    chunk: int | None = None,
    stream: bool | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> KMeans:
    """Clusters the rows of `x` [N, D] into k groups.

    x: a numpy or jax array, a numpy memmap, or a scipy sparse matrix: at a low density a CPU multiplies its entries alone, else
    its rows are made dense a chunk at a time.
    init: "k-means++" (greedy, 2 + ln k candidates a step), "random" (k different points) or centres [k, D].
    n_init: restarts, of which the lowest inertia wins; given centres are run once. tol: stop when the centres' total
    squared shift is at most tol times the mean variance of a feature. spherical: rows and centres on the unit sphere,
    so that inertia is twice the sum of (1 - cosine). chunk: rows at a time. stream: keep the points in host memory
    and send chunks to the device in every pass; by default only for sparse or very large input (True: never by entries). mesh: spread each
    chunk's rows over its batch axes; every process calls with the same points and gets the result.
    Raises SAEError for k > N, a NaN, or initial centres of another shape.
    """
    if scipy.sparse.issparse(x):
        kind = SparsePoints
    else:
        kind, x = Points, x if isinstance(x, np.ndarray | jax.Array) else np.asarray(x)
    points = kind(x, chunk=chunk, spherical=spherical, stream=stream, mesh=mesh)
    if not 1 <= k <= points.count:
        raise SAEError(f"kmeans: k is {k}; give 1 <= k <= {points.count}, the number of points")
    if n_init < 1 or max_iter < 1:
        raise SAEError(f"kmeans: n_init is {n_init} and max_iter {max_iter}; both must be at least 1")
    if isinstance(init, str):
        if init not in STARTS:
            raise SAEError(f"kmeans: unknown init {init!r}; known: {', '.join(STARTS)}, or an array of centres")
        starts = (STARTS[init](points, k, np.random.default_rng((seed, run))) for run in range(n_init))
    else:
        starts = [given_start(points, k, np.asarray(init, np.float32))]
    return min((lloyd(points, start, max_iter, tol) for start in starts), key=lambda result: result.inertia)


def given_start(points: Points, k: int, centers: np.ndarray) -> np.ndarray:
    """The caller's centres on the points' own scale."""
    if centers.shape != (k, points.width):
        raise SAEError(f"kmeans: init has shape {centers.shape}; centres for this call have shape {(k, points.width)}")
    if not np.isfinite(centers).all():
        raise SAEError("kmeans: init holds a NaN or an infinity")
    return (unit_rows(centers) if points.spherical else centers) - points.mean


def random_start(points: Points, k: int, rng: np.random.Generator) -> np.ndarray:
    """k different points."""
    return points.host_rows(np.sort(rng.choice(points.count, k, replace=False)))


def plus_plus_start(points: Points, k: int, rng: np.random.Generator) -> np.ndarray:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): each step draws a few candidates with probability
    proportional to the squared distance to the nearest centre so far and keeps the one that lowers the sum most."""
    centers = [points.host_rows(np.array([rng.integers(points.count)]))[0]]
    nearest = points.candidate_distances(centers[0][None], np.full(points.count, np.inf, np.float32))[0]
    for _ in range(k - 1):
        cumulative = np.cumsum(nearest, dtype=np.float64)
        draws = rng.random(2 + int(math.log(k))) * cumulative[-1]
        chosen = np.minimum(np.searchsorted(cumulative, draws, side="right"), points.count - 1)
        candidates = points.host_rows(chosen)
        updated = points.candidate_distances(candidates, nearest)
        best = int(np.argmin(updated.sum(axis=1, dtype=np.float64)))
        centers.append(candidates[best])
        nearest = updated[best]
    return np.stack(centers)


STARTS = {"k-means++": plus_plus_start, "random": random_start}


def lloyd(points: Points, start: np.ndarray, max_iter: int, tol: float) -> KMeans:
    """Lloyd's iterations from `start` until no label changes, the centres stand still, or max_iter."""
    centers, labels, settled = start.astype(np.float32), None, False
    for _ in range(max_iter):
        found = points.assign(centers, labels)
        counts, changed = points.fetch((found.counts, found.changed))
        if not counts.all():
            found = relocate_empty(points, centers, found)
        centers, shift = next_centers(found.sums, found.counts, centers, points.spherical)
        labels = found.labels
        settled = int(changed) == 0
        if settled or float(points.fetch(shift)) <= tol * points.variance:
            break
    if not settled:
        labels = points.assign(centers, labels).labels
    inertia = float(points.distances(centers, labels).sum(dtype=np.float64))
    return KMeans(points.fetch(centers) + points.mean, points.gather(labels), inertia)


def next_centers_impl(
    sums_KD: Float[Array, "K D"], counts_K: Float[Array, "K"], old_KD: Float[Array, "K D"], spherical: bool
) -> tuple[Float[Array, "K D"], Float[Array, ""]]:
    """The clusters' means and the total squared shift. A cluster that stays empty (fewer different points than
    clusters) sits on the largest one."""
    means = sums_KD / jnp.maximum(counts_K, 1.0)[:, None]
    means = jnp.where(counts_K[:, None] > 0, means, means[jnp.argmax(counts_K)])
    if spherical:
        norms = jnp.linalg.norm(means, axis=1, keepdims=True)
        means = jnp.where(norms > 0, means / norms, old_KD)
    return means, jnp.sum((means - old_KD) ** 2)


next_centers = jax.jit(next_centers_impl, static_argnames="spherical")


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to norm 1; zero rows stay."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1.0)


def relocate_empty(points: Points, centers: Array, found: Pass) -> Pass:
    """Gives every empty cluster one of the points farthest from their own centres, taken out of its old cluster's
    sum; the labels change in the next pass. Nothing is moved when every point sits on its centre."""
    sums, counts = map(np.array, points.fetch((found.sums, found.counts)))
    empty = np.flatnonzero(counts == 0)
    distances = points.distances(centers, found.labels)
    if distances.max() == 0:
        return found
    farthest = np.argpartition(distances, -len(empty))[: -len(empty) - 1 : -1]
    labels = points.gather(found.labels)[farthest]
    rows = points.host_rows(farthest)
    for cluster, old, row in zip(empty, labels, rows, strict=True):
        sums[old] -= row
        counts[old] -= 1
        sums[cluster] = row
        counts[cluster] = 1
    return found._replace(sums=sums, counts=counts)
