"""From pooled features to the vectors that clusters and probes use.

Rare and ubiquitous features go (document frequency), rows get norm 1, and what token length explains is taken out. Length
is the great confounder here: the number of active SAE features of a text correlates with its length at about 0.9.

The pool may be larger than memory: everything runs over blocks of CSR rows. Length is regressed out in closed form: with
L = (1, standardised log length) [N, 2], the residual of X is X - L C, C = (L'L)^-1 L'X [2, D]; X stays sparse, and only
the rows asked for become dense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import sparse

from jaxrl_llm.curation.threads import blas_threads_for
from jaxrl_llm.errors import UserError


class Blocks(Protocol):
    """Pooled features [N, D] as CSR blocks of consecutive rows."""

    shape: tuple[int, int]

    def blocks(self) -> Iterator[sparse.csr_matrix]: ...

    def rows(self, indices: np.ndarray) -> sparse.csr_matrix: ...


@dataclass(frozen=True)
class MatrixBlocks:
    """A matrix in memory as Blocks of `block_rows` rows."""

    matrix: sparse.csr_matrix
    block_rows: int = 4096

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape

    def blocks(self) -> Iterator[sparse.csr_matrix]:
        for start in range(0, self.shape[0], self.block_rows):
            yield self.matrix[start : start + self.block_rows]

    def rows(self, indices: np.ndarray) -> sparse.csr_matrix:
        return self.matrix[indices]


def as_blocks(x) -> Blocks:
    """Wrap a matrix; Blocks pass through."""
    return x if hasattr(x, "blocks") else MatrixBlocks(sparse.csr_matrix(x))


@dataclass(frozen=True)
class FeatureSpace:
    """A fitted transformation, for the pool it was fitted on and for new rows alike.

    columns: [D'] kept features. coefficients: [2, D'] of the regression on length, or None. length_mean, length_std: of log
    token length over the pool. normalise: rows to norm 1 (before length is taken out).
    """

    columns: np.ndarray
    coefficients: np.ndarray | None
    length_mean: float
    length_std: float
    normalise: bool = True

    @classmethod
    def fit(
        cls,
        features,
        lengths: np.ndarray,
        *,
        min_rows: int = 5,
        max_share: float = 0.5,
        normalise: bool = True,
        remove_length: bool = True,
    ) -> FeatureSpace:
        """features: CSR matrix or Blocks [N, D]. lengths: [N] tokens. Features active in fewer than `min_rows` rows or in more
        than `max_share` of them are dropped. Raises UserError when none is left."""
        features = as_blocks(features)
        n, width = features.shape
        if n != len(lengths):
            raise UserError(f"feature space: {n} rows of features but {len(lengths)} lengths")
        active = np.zeros(width, dtype=np.int64)
        for block in features.blocks():
            active += np.bincount(block.indices[block.data != 0], minlength=width)
        columns = np.flatnonzero((active >= min_rows) & (active <= max_share * n))
        if not len(columns):
            raise UserError(
                f"feature space: none of {width} features is active in at least {min_rows} and at most {max_share:.0%} of "
                f"{n} rows: give more rows or a wider SAE (in curate, or lower features.min_rows or raise features.max_share)"
            )
        logs = np.log(np.maximum(np.asarray(lengths, np.float64), 1))
        space = cls(columns, None, float(logs.mean()), float(logs.std()) or 1.0, normalise)
        if not remove_length:
            return space
        basis, cross, start = space.basis(lengths), np.zeros((2, len(columns))), 0
        for block in features.blocks():
            part = space.sparse_rows(block)
            cross += basis[start : start + part.shape[0]].T @ part
            start += part.shape[0]
        coefficients = np.linalg.lstsq(basis.T @ basis, cross, rcond=None)[0]
        return cls(columns, coefficients, space.length_mean, space.length_std, normalise)

    @property
    def width(self) -> int:
        return len(self.columns)

    def basis(self, lengths: np.ndarray) -> np.ndarray:
        """[N, 2]: ones and standardised log length."""
        logs = np.log(np.maximum(np.asarray(lengths, np.float64), 1))
        return np.stack([np.ones(len(logs)), (logs - self.length_mean) / self.length_std], axis=1)

    def sparse_rows(self, block: sparse.csr_matrix) -> sparse.csr_matrix:
        """The kept columns of raw rows, normalised; length is still in."""
        block = block[:, self.columns].astype(np.float32)
        if not self.normalise:
            return block
        norms = np.sqrt(np.asarray(block.multiply(block).sum(axis=1)).ravel())
        return sparse.diags_array(1 / np.where(norms > 0, norms, 1).astype(np.float32)).tocsr() @ block

    def view(self, features, lengths: np.ndarray) -> SpaceView:
        """This space's vectors of the given rows, as a Design for probes."""
        return SpaceView(self, as_blocks(features), np.asarray(lengths))


@dataclass(frozen=True)
class SpaceView:
    """The rows of `features` in `space`; `rows` gives dense float32 [n, D'] without length."""

    space: FeatureSpace
    features: Blocks
    lengths: np.ndarray

    def __len__(self) -> int:
        return self.features.shape[0]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        dense = self.space.sparse_rows(self.features.rows(np.asarray(indices))).toarray()
        if self.space.coefficients is not None:
            dense -= (self.space.basis(self.lengths[indices]) @ self.space.coefficients).astype(np.float32)
        return dense

    def directions(self, dims: int, *, fit_rows: int = 8192, seed: int = 0) -> np.ndarray:
        """[D', <= dims] principal directions of these rows: truncated SVD of at most `fit_rows` random ones, largest first."""
        from sklearn.decomposition import TruncatedSVD

        n = len(self)
        chosen = np.sort(np.random.default_rng([seed, n]).permutation(n)[:fit_rows])
        dims = min(dims, self.space.width - 1, len(chosen) - 1)
        if dims < 1:
            return np.eye(self.space.width, dtype=np.float32)
        sample = self.space.sparse_rows(self.features.rows(chosen))
        with blas_threads_for(sample.shape[0] * sample.shape[1]):
            return TruncatedSVD(dims, random_state=seed).fit(sample).components_.T.astype(np.float32)

    def project(self, directions: np.ndarray) -> np.ndarray:
        """[N, dims] float32 scores of all rows along `directions` [D', dims], block by block. Length is taken out of the scores,
        which equals taking it out of the features first."""
        parts, start = [], 0
        for block in self.features.blocks():
            part = self.space.sparse_rows(block) @ directions
            if self.space.coefficients is not None:
                basis = self.space.basis(self.lengths[start : start + part.shape[0]])
                part = part - basis @ (self.space.coefficients @ directions)
            parts.append(np.asarray(part, np.float32))
            start += part.shape[0]
        return np.concatenate(parts)

    def reduce(self, dims: int, *, fit_rows: int = 8192, seed: int = 0) -> np.ndarray:
        """[N, <= dims] float32: the rows projected on their own principal directions."""
        return self.project(self.directions(dims, fit_rows=fit_rows, seed=seed))


def dense_space(features, lengths: np.ndarray, remove_length: bool = True) -> SpaceView:
    """Dense features [N, D] (the controls) as a view: every column, no normalisation, length taken out in the same way."""
    space = FeatureSpace.fit(features, lengths, min_rows=0, max_share=1.0, normalise=False, remove_length=remove_length)
    return space.view(features, lengths)
