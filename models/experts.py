"""Mixtures of experts: which experts a token goes to, and the experts' MLPs over the tokens that they were given, none dropped.

Letters: B batch, T tokens, N = B * T of them on a device, K experts a token, E experts, M = N * K token copies sorted by expert,
D d_model, F width of an expert.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

TILE = 128  # most rows of one expert that are multiplied at once where they are cut into tiles


def route(
    logits_BTE: Float[Array, "B T E"], experts_per_token: int, renormalise: bool
) -> tuple[Float[Array, "B T K"], Int[Array, "B T K"]]:
    """The probabilities (fp32) and numbers of the `experts_per_token` most probable experts of each token.

    renormalise: the probabilities of a token's experts sum to one (Mixtral), rather than to what is left of the softmax over all.
    """
    weights_BTK, chosen_BTK = lax.top_k(jax.nn.softmax(logits_BTE.astype(jnp.float32), axis=-1), experts_per_token)
    if renormalise:
        weights_BTK = weights_BTK / jnp.sum(weights_BTK, axis=-1, keepdims=True)
    return weights_BTK, chosen_BTK


def expert_mlp(
    x_BTD: Float[Array, "B T D"],
    weights_BTK: Float[Array, "B T K"],
    chosen_BTK: Int[Array, "B T K"],
    gate_EDF: Float[Array, "E D F"],
    up_EDF: Float[Array, "E D F"],
    down_EFD: Float[Array, "E F D"],
    *,
    activation: Callable[[Array], Array],
    mesh: Any,
    rows: Sequence[str],
    product: str,
) -> Float[Array, "B T D"]:
    """Sum over a token's experts of weight * down(activation(gate(x)) * up(x)), in x's dtype.

    Dropless: every token reaches all its experts, however many tokens an expert gets (Gale et al. 2022, arXiv 2211.15841, section 4).
    mesh: where the parameters live (empty: on one device). Rows are spread over the axes `rows` of it, one of which may be "expert", experts
    over "expert" and F over "tensor", each where it divides. A device gathers the tokens of its "expert" group, computes what its own
    experts give for them, and gets back the sums for its own tokens. product: name that a recomputed layer may keep results by.
    """
    local = functools.partial(_local_experts, activation=activation, product=product)
    if mesh.empty:
        return local(x_BTD, weights_BTK, chosen_BTK, gate_EDF, up_EDF, down_EFD)
    divides = lambda size, name: mesh.shape.get(name, 1) > 1 and size % mesh.shape[name] == 0  # noqa: E731
    present = tuple(name for name in rows if name in mesh.shape)
    over = present if x_BTD.shape[0] % math.prod(mesh.shape[name] for name in present) == 0 else ()
    expert = "expert" if divides(gate_EDF.shape[0], "expert") else None
    tensor = "tensor" if divides(gate_EDF.shape[2], "tensor") else None
    gathered = expert is not None and expert in over

    def on_device(x, weights, chosen, gate, up, down):
        if gathered:
            x, weights, chosen = (lax.all_gather(a, expert, axis=0, tiled=True) for a in (x, weights, chosen))
        if expert is not None:
            chosen = chosen - lax.axis_index(expert) * gate.shape[0]
        y = local(x, weights, chosen, gate, up, down)
        if tensor is not None:
            y = lax.psum(y, tensor)
        if gathered:
            return lax.psum_scatter(y, expert, scatter_dimension=0, tiled=True)
        return y if expert is None else lax.psum(y, expert)

    token, wide = PartitionSpec(over or None), PartitionSpec(expert, None, tensor)
    specs = (token, token, token, wide, wide, PartitionSpec(expert, tensor))
    run = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=token, check_vma=False)
    return run(x_BTD, weights_BTK, chosen_BTK, gate_EDF, up_EDF, down_EFD)


def _local_experts(x_BTD, weights_BTK, chosen_BTK, gate_EDF, up_EDF, down_EFD, *, activation, product):
    """`expert_mlp` of the experts that are here; a token's expert with a number outside of 0..E-1 is elsewhere and adds nothing."""
    E, K = gate_EDF.shape[0], chosen_BTK.shape[-1]
    x_ND, expert_M = x_BTD.reshape(-1, x_BTD.shape[-1]), chosen_BTK.reshape(-1)
    expert_M = jnp.where((expert_M >= 0) & (expert_M < E), expert_M, E)  # those elsewhere come last
    order_M = jnp.argsort(expert_M, stable=True)
    sizes_E = jnp.bincount(expert_M, length=E + 1)[:E].astype(jnp.int32)
    x_MD = x_ND[order_M // K]

    def products(rows, matrices):
        return checkpoint_name(grouped_matmul(rows, matrices, sizes_E).astype(x_BTD.dtype), product)

    act_MF = activation(products(x_MD, gate_EDF)) * products(x_MD, up_EDF)
    y_MD = products(act_MF, down_EFD)[jnp.argsort(order_M)]
    weights_M = jnp.where(expert_M < E, weights_BTK.reshape(-1), 0.0)
    y_NKD = (y_MD * weights_M[:, None]).reshape(-1, K, x_BTD.shape[-1])  # in fp32, by the weights
    return jnp.sum(y_NKD, axis=1).astype(x_BTD.dtype).reshape(x_BTD.shape)


def grouped_matmul(x_MD: Float[Array, "M D"], w_EDF: Float[Array, "E D F"], sizes_E: Int[Array, " E"]) -> Float[Array, "M F"]:
    """Rows of x times the matrix of their group, fp32: the first sizes[0] rows times w[0], the next sizes[1] times w[1], and so on; 0 past
    the last group.

    `jax.lax.ragged_dot` where the compiler knows such a product (TPU); elsewhere XLA multiplies every row by every matrix for it, so there
    the groups are cut into tiles.
    """
    ragged = functools.partial(lax.ragged_dot, preferred_element_type=jnp.float32)
    here_M1 = jnp.arange(len(x_MD))[:, None] < jnp.sum(sizes_E)
    # Past the last group a product may hold anything, and so may its gradient by x: both are cut off.
    y_MF = lax.platform_dependent(jnp.where(here_M1, x_MD, 0), w_EDF, sizes_E, tpu=ragged, default=_tiled_matmul)
    return jnp.where(here_M1, y_MF, 0.0)


def _tile(n_rows: int, n_groups: int) -> int:
    """Rows a tile: no more than a group has on average, as each group's last tile is filled up with zeros."""
    return min(TILE, 1 << max(n_rows // n_groups, 1).bit_length() - 1)


def _tiles(n_rows: int, sizes_E: Array, tile: int) -> tuple[Array, Array]:
    """(where each row goes among the rows of all tiles [M], the group of each tile [C]); no tile has rows of two groups."""
    count_E = -(-sizes_E // tile)
    ends_E = jnp.cumsum(count_E)
    group_C = jnp.searchsorted(ends_E, jnp.arange(n_rows // tile + len(sizes_E)), side="right")
    row_M, row_ends_E = jnp.arange(n_rows), jnp.cumsum(sizes_E)
    group_M = jnp.searchsorted(row_ends_E, row_M, side="right")
    shift_E = (ends_E - count_E) * tile - (row_ends_E - sizes_E)
    at_M = row_M + shift_E.at[group_M].get(mode="clip")
    past = len(group_C) * tile  # rows of no group
    return jnp.where(group_M < len(sizes_E), at_M, past), jnp.minimum(group_C, len(sizes_E) - 1)


def _in_tiles(rows_MX: Array, at_M: Array, tiles: int, tile: int) -> Array:
    return jnp.zeros((tiles * tile, rows_MX.shape[1]), rows_MX.dtype).at[at_M].set(rows_MX, mode="drop").reshape(tiles, tile, -1)


def _times(tiles_CtX: Array, matrix_of: Callable[[Array], Array], group_C: Array, at_M: Array) -> Array:
    """Each tile times the matrix of its group, as rows [M, ...] in fp32."""
    product = lambda given: jnp.matmul(given[0], matrix_of(given[1]), preferred_element_type=jnp.float32)  # noqa: E731
    out_CtY = lax.map(product, (tiles_CtX, group_C))
    return out_CtY.reshape(-1, out_CtY.shape[-1]).at[at_M].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _tiled_matmul(x_MD, w_EDF, sizes_E):
    """`grouped_matmul` by tiles of rows. Its own gradient, since that of a loop adds up a whole w_EDF for each tile."""
    tile = _tile(len(x_MD), len(w_EDF))
    at_M, group_C = _tiles(len(x_MD), sizes_E, tile)
    return _times(_in_tiles(x_MD, at_M, len(group_C), tile), lambda group: w_EDF[group], group_C, at_M)


def _tiled_forward(x_MD, w_EDF, sizes_E):
    return _tiled_matmul(x_MD, w_EDF, sizes_E), (x_MD, w_EDF, sizes_E)


def _tiled_backward(kept, g_MF):
    x_MD, w_EDF, sizes_E = kept
    tile = _tile(len(x_MD), len(w_EDF))
    at_M, group_C = _tiles(len(x_MD), sizes_E, tile)
    x_CtD, g_CtF = (_in_tiles(rows, at_M, len(group_C), tile) for rows in (x_MD, g_MF))
    dx_MD = _times(g_CtF, lambda group: w_EDF[group].T.astype(jnp.float32), group_C, at_M)

    def add(c, dw_EDF):
        return dw_EDF.at[group_C[c]].add(jnp.matmul(x_CtD[c].T.astype(jnp.float32), g_CtF[c]))

    dw_EDF = lax.fori_loop(0, len(group_C), add, jnp.zeros(w_EDF.shape, jnp.float32))
    return dx_MD.astype(x_MD.dtype), dw_EDF.astype(w_EDF.dtype), None


_tiled_matmul.defvjp(_tiled_forward, _tiled_backward)
