"""The points of a clustering as scipy's sparse rows: passes over their entries alone, or over chunks made dense.

Letters as in `sae.points`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import scipy.sparse
from jaxtyping import Array

from sae.errors import SAEError
from sae.points import CHUNK_BYTES, Pass, Points

# Up to this share of entries that are not zero, a CPU's products of entries are quicker than its dense ones (k 16 to 256, 6,144
# features: even at 1/20 to 1/10, the time to make rows dense aside).
ENTRIES_DENSITY = 1 / 16
ROUNDING = 1e-14  # of a squared norm: what two fp32 rows that are equal may differ by when their products are summed in fp64


class SparsePoints(Points):
    """Sparse rows to cluster. They are not centred (`mean` is zero): centring would fill them.

    by_entries: passes multiply entries on the host (scipy, one thread a core), instead of making rows dense chunk by chunk
    for the device. So it is on a CPU at a low density; a mesh or `stream` asks for the chunks.
    """

    def __init__(self, x: Any, *, chunk: int | None, spherical: bool, stream: bool | None, mesh: Any):
        x = x.tocsr()
        if not x.has_canonical_format:
            x = x.copy()  # the caller's keeps its form
            x.sum_duplicates()
        if 0 not in x.shape:
            x = unit_entries(x) if spherical else x.astype(np.float32, copy=False)
        super().__init__(x, chunk=chunk, spherical=spherical, stream=stream is None or stream, mesh=mesh)
        here = mesh is None and stream is None and jax.devices()[0].platform == "cpu"
        self.by_entries = here and x.nnz <= ENTRIES_DENSITY * self.count * self.width
        self.squares = np.asarray(x.multiply(x).sum(axis=1), np.float32).ravel()  # [N] squared norms

    def _raw(self, index: slice | np.ndarray) -> np.ndarray:
        return self.source[index].toarray()

    def host_rows(self, index: slice | np.ndarray) -> np.ndarray:
        return self._raw(index)

    def _moments(self, chunks: Iterable[tuple[Array, int]]) -> tuple[np.ndarray, float]:
        x = self.source
        if not (finite := np.isfinite(x.data)).all():
            bad = int(np.searchsorted(x.indptr, np.argmin(finite), side="right")) - 1
            raise SAEError(f"kmeans: row {bad} of x holds a NaN or an infinity; remove or repair it")
        entries = x.data.astype(np.float64)
        total, squares = (np.bincount(x.indices, weights=part, minlength=self.width) / self.count for part in (entries, entries**2))
        return np.zeros(self.width, np.float32), float(np.mean(np.maximum(squares - total**2, 0.0)))

    def _parts(self, work: Callable[[slice], Any], columns: int) -> Iterator[Any]:
        """`work` on slices of the rows whose result of `columns` numbers a row stays small, a thread for each core, in order."""
        step = max(1, CHUNK_BYTES // 4 // columns)
        slices = [slice(start, min(start + step, self.count)) for start in range(0, self.count, step)]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            yield from pool.map(work, slices)

    def assign(self, centers: Array, old: list[Array] | None) -> Pass:
        if not self.by_entries:
            return super().assign(centers, old)
        columns = np.ascontiguousarray(np.asarray(centers).T)
        own, K = np.square(columns).sum(axis=0), columns.shape[1]

        def one(part: slice) -> tuple[np.ndarray, Any]:
            x = self.source[part]
            labels = np.argmin(own - 2.0 * (x @ columns), axis=1).astype(np.int32)  # the first of equals
            ones = np.ones(len(labels), np.float32)
            return labels, scipy.sparse.csc_matrix((ones, labels, np.arange(len(labels) + 1)), shape=(K, len(labels))) @ x

        parts = list(self._parts(one, K))
        labels = np.concatenate([found for found, _ in parts])
        sums = np.asarray(sum(rows for _, rows in parts).todense(), np.float32)
        changed = len(labels) if old is None else int(np.count_nonzero(labels != old[0]))
        return Pass([labels], sums, np.bincount(labels, minlength=K).astype(np.float32), changed)

    def distances(self, centers: Array, labels: list[Array]) -> np.ndarray:
        if not self.by_entries:
            return super().distances(centers, labels)
        table, label = np.asarray(centers, np.float64), np.asarray(labels[0])
        own = np.square(table).sum(axis=1)

        def one(part: slice) -> np.ndarray:
            x = self.source[part]
            centre = table[np.repeat(label[part], np.diff(x.indptr)), x.indices]
            # |x - c|^2 = |c|^2 + sum over x's entries of x (x - 2 c): in fp64, since the two cancel where a point is near its centre.
            products = scipy.sparse.csr_matrix((x.data * (x.data - 2.0 * centre), x.indices, x.indptr), shape=x.shape)
            found = own[label[part]] + np.asarray(products.sum(axis=1)).ravel()
            return np.where(found > ROUNDING * own[label[part]], found, 0.0).astype(np.float32)

        most = max(1, -(-self.source.nnz // self.count))
        return np.concatenate(list(self._parts(one, 4 * most)))

    def candidate_distances(self, candidates: np.ndarray, nearest: np.ndarray) -> np.ndarray:
        """From the entries in any case: a start of k centres makes k such passes, each over few candidates, and to make every row dense
        for them costs far more than their products."""
        columns = np.ascontiguousarray(candidates.T)
        own = np.square(columns).sum(axis=0)

        def one(part: slice) -> np.ndarray:
            found = own[:, None] + self.squares[part] - 2.0 * (self.source[part] @ columns).T
            return np.minimum(nearest[part], np.maximum(found, 0.0))

        return np.concatenate(list(self._parts(one, len(candidates))), axis=1)


def unit_entries(x: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Rows scaled to norm 1; rows without entries stay."""
    norms = np.sqrt(np.asarray(x.multiply(x).sum(axis=1), np.float64)).ravel()
    scaled = (x.data / np.repeat(np.where(norms > 0, norms, 1.0), np.diff(x.indptr))).astype(np.float32)
    return scipy.sparse.csr_matrix((scaled, x.indices, x.indptr), shape=x.shape)
