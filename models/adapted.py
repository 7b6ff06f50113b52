"""A matrix with a low-rank adapter beside it (LoRA; Hu et al. 2021, arXiv 2106.09685), as one leaf of the parameters.

Where a kernel W stood, `Adapted(W, A, B, scale)` may stand: `models.layers.dense` then computes x W + scale (x A) B, so that whatever runs the
model (training, sampling, taps) runs the adapted one, nothing is merged, and a gradient by A and B makes none by W.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=["base", "a", "b"], meta_fields=["scale"])
@dataclasses.dataclass(frozen=True)
class Adapted:
    """base [layers..., in..., out...], a [layers..., in..., rank], b [layers..., rank, out...], each of any float dtype.

    The base comes first among the leaves, where Flax compares shapes with those it declared.
    """

    base: Array
    a: Array
    b: Array
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the base, which it stands for."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """That of the base."""
        return self.base.ndim

    @property
    def dtype(self) -> Any:
        """That of the base."""
        return self.base.dtype

    def __getitem__(self, layer: int) -> Adapted:
        """One layer of a stack."""
        return Adapted(self.base[layer], self.a[layer], self.b[layer], self.scale)

    def merged(self) -> Array:
        """W + scale A B, computed in fp32, in W's dtype."""
        stacked = self.a.ndim + self.b.ndim - 2 - self.base.ndim
        head, rank = self.base.shape[:stacked], self.a.shape[-1]
        a = self.a.astype(jnp.float32).reshape(*head, -1, rank)
        b = self.b.astype(jnp.float32).reshape(*head, rank, -1)
        delta = jnp.matmul(a, b).reshape(self.base.shape)
        return (self.base.astype(jnp.float32) + self.scale * delta).astype(self.base.dtype)


def _is_adapted(leaf: Any) -> bool:
    return isinstance(leaf, Adapted)


def merged(tree: Any) -> Any:
    """The tree with a plain matrix, `Adapted.merged`, for each adapted one; without any, itself. Pure; gradients reach all parts."""
    return jax.tree.map(lambda leaf: leaf.merged() if _is_adapted(leaf) else leaf, tree, is_leaf=_is_adapted)


def base_of(kernel: Array | Adapted) -> Array:
    """The matrix without its adapter, if it has one."""
    return kernel.base if isinstance(kernel, Adapted) else kernel


def bases(tree: Any) -> Any:
    """The tree with the matrix without its adapter for each adapted one."""
    return jax.tree.map(base_of, tree, is_leaf=_is_adapted)


def side_by_side(kernels: Sequence[Array | Adapted]) -> Array | Adapted:
    """Kernels [in, heads, ...] of one input as one kernel with all their heads. The adapters' ranks add up: B has blocks, zero elsewhere."""
    base = jnp.concatenate([base_of(kernel) for kernel in kernels], axis=1)
    adapted = [kernel for kernel in kernels if isinstance(kernel, Adapted)]
    if not adapted:
        return base
    blocks, start = [], 0
    for kernel in kernels:
        heads = kernel.shape[1]
        if isinstance(kernel, Adapted):
            around = ((0, 0), (start, base.shape[1] - start - heads)) + ((0, 0),) * (kernel.ndim - 2)
            blocks.append(jnp.pad(kernel.b, around))
        start += heads
    return Adapted(base, jnp.concatenate([kernel.a for kernel in adapted], axis=-1), jnp.concatenate(blocks), adapted[0].scale)
