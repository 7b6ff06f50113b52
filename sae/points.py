"""The points of a clustering as chunks of dense rows, kept on the device or sent there in every pass.

Letters: N points, D features, K clusters, n points a chunk.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from models.sharding import BATCH_AXES, fetch, place
from sae.errors import SAEError

CHUNK_BYTES = 32 << 20  # of dense fp32 rows a chunk
RESIDENT_BYTES = 8 << 30  # dense input up to this size is kept on the device as a whole
HIGHEST = lax.Precision.HIGHEST  # labels must not depend on an accelerator's short formats


class Pass(NamedTuple):
    """One pass over the points: each chunk's labels, cluster sums [K, D] and sizes [K], how many labels changed."""

    labels: list[Array]
    sums: Array
    counts: Array
    changed: Array


def nearest(x_nD: Float[Array, "n D"], centers_KD: Float[Array, "K D"]) -> Int[Array, "n"]:
    """The nearest centre of each row, the first of equals."""
    dots = jnp.einsum("nd,kd->nk", x_nD, centers_KD, precision=HIGHEST)
    scores = jnp.sum(centers_KD * centers_KD, axis=1) - 2.0 * dots
    # A minimum and a match, since XLA vectorises these on CPU and argmin not.
    K = centers_KD.shape[0]
    best = scores.min(axis=1, keepdims=True)
    return jnp.min(jnp.where(scores == best, jnp.arange(K, dtype=jnp.int32), K - 1), axis=1)


def cluster_sums(
    x_nD: Float[Array, "n D"], labels_n: Int[Array, "n"], K: int, one_hot: bool
) -> tuple[Float[Array, "K D"], Float[Array, "K"]]:
    """Sum and number of each cluster's rows; labels outside [0, K) take no part.

    one_hot: as a matrix product, the fast form on accelerators; else by row additions, the fast form on CPUs.
    """
    if not one_hot:
        ones = jnp.ones(labels_n.shape, x_nD.dtype)
        return jax.ops.segment_sum(x_nD, labels_n, K), jax.ops.segment_sum(ones, labels_n, K)
    members = (labels_n[:, None] == jnp.arange(K)).astype(x_nD.dtype)
    return jnp.einsum("nk,nd->kd", members, x_nD, precision=HIGHEST), members.sum(axis=0)


@functools.partial(jax.jit, static_argnames="one_hot")
def assign_chunk(x_nD, valid, centers_KD, old_n, *, one_hot):
    """(labels, sums, counts, changed) of one chunk whose first `valid` rows are real; padding rows get label K."""
    K = centers_KD.shape[0]
    real = jnp.arange(x_nD.shape[0]) < valid
    labels = jnp.where(real, nearest(x_nD, centers_KD), K)
    sums, counts = cluster_sums(x_nD, labels, K, one_hot)
    return labels, sums, counts, jnp.sum((labels != old_n) & real)


@functools.partial(jax.jit, static_argnames="spherical")
def prepared(x_nD, mean_D, *, spherical):
    """Rows as they are clustered: fp32, on the unit sphere if spherical, else less the mean."""
    x = x_nD.astype(jnp.float32)
    if not spherical:
        return x - mean_D
    norms = jnp.linalg.norm(x, axis=1, keepdims=True)
    return x / jnp.where(norms > 0, norms, 1.0)


@jax.jit
def chunk_moments(x_nD, valid, origin_D):
    """Sums of the real rows' offsets from `origin_D` and of their squares."""
    offset = jnp.where((jnp.arange(x_nD.shape[0]) < valid)[:, None], x_nD.astype(jnp.float32) - origin_D, 0.0)
    return offset.sum(axis=0), jnp.sum(offset * offset, axis=0)


@jax.jit
def chunk_distances(x_nD, centers_KD, labels_n):
    """Squared distance of each row to its own centre."""
    difference = x_nD - centers_KD[jnp.minimum(labels_n, centers_KD.shape[0] - 1)]
    return jnp.sum(difference * difference, axis=1)


@jax.jit
def chunk_candidates(x_nD, nearest_n, candidates_LD):
    """[L, n] squared distance of each row to its nearest centre once candidate l is added to the centres."""
    dots = jnp.einsum("ld,nd->ln", candidates_LD, x_nD, precision=HIGHEST)
    norms = jnp.sum(candidates_LD * candidates_LD, axis=1)[:, None] + jnp.sum(x_nD * x_nD, axis=1)
    return jnp.minimum(nearest_n, jnp.maximum(norms - 2.0 * dots, 0.0))


class Points:
    """Rows to cluster and the passes that k-means makes over them.

    Attributes: count N, width D, mean [D], variance (mean over features). Dense rows are centred on their mean, as
    scikit-learn does for accuracy; `mean` is zero for spherical input. mesh: rows of a chunk are
    spread over those of the batch axes that it has; every process makes the same points and passes.
    """

    def __init__(self, x: Any, *, chunk: int | None, spherical: bool, stream: bool | None, mesh: Any):
        if x.ndim != 2 or 0 in x.shape:
            raise SAEError(f"kmeans: x has shape {tuple(x.shape)}; give a non-empty [points, features] array")
        if chunk is not None and chunk < 1:
            raise SAEError(f"kmeans: chunk is {chunk}; give a positive number of rows")
        self.count, self.width = x.shape
        self.source, self.spherical, self.mesh = x, spherical, mesh
        self.axes = () if mesh is None else tuple(name for name in BATCH_AXES if name in mesh.shape)
        self.chunk = self._chunk_rows(chunk)
        self.one_hot = (jax.devices()[0] if mesh is None else mesh.devices.flat[0]).platform != "cpu"
        streamed = stream if stream is not None else 4 * self.count * self.width > RESIDENT_BYTES
        raw = None if streamed else list(self._send())
        self.mean, self.variance = self._moments(raw or self._send())
        self.resident = None if raw is None else [(self._prepared(rows), valid) for rows, valid in raw]

    def _chunk_rows(self, chunk: int | None) -> int:
        """Rows a chunk: at most those asked for, nearly equal, a multiple of the devices that share them."""
        rows = min(chunk or max(1, CHUNK_BYTES // (4 * self.width)), self.count)
        rows = -(-self.count // -(-self.count // rows))
        shards = math.prod(self.mesh.shape[name] for name in self.axes)
        return -(-rows // shards) * shards

    def _raw(self, index: slice | np.ndarray) -> np.ndarray:
        return np.asarray(self.source[index], np.float32)

    def host_rows(self, index: slice | np.ndarray) -> np.ndarray:
        """Rows as they are clustered, on the host."""
        return np.asarray(self._prepared(self._raw(index)))

    def _prepared(self, rows: Any) -> Array:
        return prepared(rows, self.mean, spherical=self.spherical)

    def _moments(self, chunks: Iterable[tuple[Array, int]]) -> tuple[np.ndarray, float]:
        """Mean row (zero where rows are not centred) and mean variance; raises on a NaN or infinity."""
        origin = self._raw(slice(0, min(self.chunk, 256))).mean(axis=0)  # near the mean, so that no digits are lost
        total, squares = np.zeros(self.width), np.zeros(self.width)
        for number, (rows, valid) in enumerate(chunks):
            rows = prepared(rows, np.zeros(self.width, np.float32), spherical=True) if self.spherical else rows
            part, part_squares = self.fetch(chunk_moments(rows, valid, origin))
            if not np.isfinite(part_squares).all():
                bad = int(np.argmin(np.isfinite(self.fetch(rows)).all(axis=1))) + number * self.chunk
                raise SAEError(f"kmeans: row {bad} of x holds a NaN or an infinity; remove or repair it")
            total += part
            squares += part_squares
        variance = float(np.mean(np.maximum(squares / self.count - (total / self.count) ** 2, 0.0)))
        return (np.zeros(self.width) if self.spherical else origin + total / self.count).astype(np.float32), variance

    def _send(self) -> Iterator[tuple[Array, int]]:
        """(raw device rows [n, D], how many are real), in order; the last chunk is padded with zeros."""
        for start in range(0, self.count, self.chunk):
            rows = self._raw(slice(start, start + self.chunk))
            valid = len(rows)
            if valid < self.chunk:
                rows = np.pad(rows, ((0, self.chunk - valid), (0, 0)))
            yield self._put(rows), valid

    def _put(self, array: np.ndarray) -> Array:
        if self.mesh is None:
            return jnp.asarray(array)
        return place(array, NamedSharding(self.mesh, PartitionSpec(self.axes or None)))

    def fetch(self, tree: Any) -> Any:
        """Arrays on the host, whole, on every process."""
        return fetch(tree, self.mesh)

    def chunks(self) -> Iterator[tuple[Array, int]]:
        """(rows as they are clustered, how many are real), from the device where they are kept there."""
        if self.resident is not None:
            return iter(self.resident)
        return ((self._prepared(rows), valid) for rows, valid in self._send())

    def assign(self, centers: Array, old: list[Array] | None) -> Pass:
        """Nearest centre of every point, with the sums that the next centres are made of."""
        labels, totals = [], None
        for i, (rows, valid) in enumerate(self.chunks()):
            before = old[i] if old is not None else np.full((self.chunk,), -1, np.int32)
            chunk_labels, *part = assign_chunk(rows, valid, centers, before, one_hot=self.one_hot)
            labels.append(chunk_labels)
            totals = part if totals is None else jax.tree.map(jnp.add, totals, part)
        return Pass(labels, *totals)

    def distances(self, centers: Array, labels: list[Array]) -> np.ndarray:
        """[N] squared distance of every point to its own centre."""
        parts = [chunk_distances(rows, centers, own) for (rows, _), own in zip(self.chunks(), labels, strict=True)]
        return self.gather(parts)

    def candidate_distances(self, candidates: np.ndarray, nearest: np.ndarray) -> np.ndarray:
        """[L, N] each point's squared distance to its nearest centre, candidate l included; `nearest` [N] without."""
        padded = np.pad(nearest, (0, -self.count % self.chunk)).reshape(-1, self.chunk)
        parts = [chunk_candidates(rows, padded[i], candidates) for i, (rows, _) in enumerate(self.chunks())]
        return np.concatenate([self.fetch(part) for part in parts], axis=1)[:, : self.count]

    def gather(self, parts: list[Array]) -> np.ndarray:
        """Chunk results joined into one host array of N entries."""
        return np.concatenate([self.fetch(part) for part in parts])[: self.count]
