"""The TopK autoencoder's reconstruction and its gradient, computed on the k kept latents only.

Each row has k of F latents, so all but the encoder's product is k / F of the dense work: decoding sums k decoder rows,
and the gradients of both matrices are sums over the rows in which a latent was kept. `reconstruct_dense` is the plain
definition, differentiated by JAX; `reconstruct_sparse` is equal to it with a gradient of its own (the fast form on
CPUs where k is small beside F, see `GATHERS_FROM`; on accelerators the dense products win). Letters: B rows, D d_in,
F d_sae, K kept latents, N blocks of C entries.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sae.base import Params, centred, matmul, pre_activations
from sae.select import by_platform, sharded_top_k, top_k

BLOCK = 8  # entries of one latent that are summed together: see `rows_by_latent`
UNROLL = 32  # gathers fused into one loop nest
LOOP_ROWS = 512  # rows that are summed at a time, in one loop nest: see `weighted_rows`
# On a CPU the gathers are faster from 16 latents for each kept one. The decoder and both gradients read d_in numbers for each latent by
# products, for each kept latent by gathers, and one read through an index costs as much as 8 to 16 read in order; so rows and d_in, in
# both, do not matter. The rule picks the faster form at all of 42 shapes timed on one core (d_in 16 to 1024, d_sae 64 to 18432, k 4 to
# 256, 256 to 4096 rows); ms a step, dense / sparse, at (d_in, d_sae, k, rows): 2867 / 862 (768, 6144, 32, 4096), 23 / 12 (96, 1024, 16,
# 1024), 143 / 123 (768, 1024, 64, 1024), 149 / 198 (768, 1024, 128, 1024), 30 / 43 (256, 512, 64, 1024).
GATHERS_FROM = 16
DOT_ROWS = 8  # rows whose decoder rows are gathered at a time: they stay in the cache


def weighted_rows(
    table_FD: Float[Array, "F D"], indices_BK: Int[Array, "B K"], weights_BK: Float[Array, "B K"]
) -> Float[Array, "B D"]:
    """Sum over k of weights[b, k] * table[indices[b, k]], without a [B, K, D] array in between.

    In a loop of at least two turns, since what XLA can fuse with the gathers (whatever makes the table, the indices or
    the weights) it computes anew for each row that they read: steps 20 times as long at some shapes, and minutes of compilation.
    """
    n, width = indices_BK.shape
    table_FD, number = jnp.asarray(table_FD), max(2, -(-n // LOOP_ROWS))
    height = -(-n // number)

    def in_blocks(x_BK):
        return jnp.pad(x_BK, ((0, number * height - n), (0, 0))).reshape(number, height, width)

    def block(indices_and_weights):
        indices, weights = indices_and_weights
        total = jnp.zeros((height, table_FD.shape[1]), jnp.float32)
        for start in range(0, width, UNROLL):
            columns = range(start, min(start + UNROLL, width))
            total = total + sum(weights[:, j, None] * table_FD[indices[:, j]] for j in columns)
        return total

    return lax.map(block, (in_blocks(indices_BK), in_blocks(weights_BK))).reshape(number * height, -1)[:n]


def row_dots(
    table_FD: Float[Array, "F D"], indices_BK: Int[Array, "B K"], rows_BD: Float[Array, "B D"]
) -> Float[Array, "B K"]:
    """The dot product of rows[b] with table[indices[b, k]] for every kept latent, a few rows at a time."""

    table_FD = jnp.asarray(table_FD)

    def dots(row_and_indices):
        row, indices = row_and_indices
        return jnp.einsum("d,kd->k", row, table_FD[indices])

    return lax.map(dots, (rows_BD, indices_BK), batch_size=min(DOT_ROWS, len(rows_BD)))


def rows_by_latent(indices_BK: Int[Array, "B K"], d_sae: int) -> tuple[Int[Array, "N C"], Int[Array, "N"]]:
    """Where each latent was kept: (positions in the flattened [B * K], -1 = none; the block's latent).

    A latent's entries fill whole blocks of C, so blocks number at most B K / C + F, whatever the counts: skewed
    latents (one may fire in every row) take many blocks, unused ones take none.
    """
    flat, entries = indices_BK.reshape(-1), indices_BK.size
    counts = jnp.zeros(d_sae, jnp.int32).at[flat].add(1)
    if (d_sae + 1) * entries <= 2**32:  # (a key of d_sae is none, and comes last) one key sorts several times faster than a key with a payload
        keys = flat.astype(jnp.uint32) * jnp.uint32(entries) + jnp.arange(entries, dtype=jnp.uint32)
        order = (jnp.sort(keys) % jnp.uint32(entries)).astype(jnp.int32)
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    ends = jnp.cumsum(counts)
    blocks = -(-counts // BLOCK)
    block_ends = jnp.cumsum(blocks)
    number = -(-entries // BLOCK) + min(d_sae, entries)
    latent_N = jnp.searchsorted(block_ends, jnp.arange(number, dtype=jnp.int32), side="right").astype(jnp.int32)
    own = jnp.minimum(latent_N, d_sae - 1)  # past the last block: latent d_sae, which is dropped
    first = ends[own] - counts[own] + (jnp.arange(number) - (block_ends[own] - blocks[own])) * BLOCK
    slots = first[:, None] + jnp.arange(BLOCK)
    real = (slots < ends[own][:, None]) & (latent_N < d_sae)[:, None]
    return jnp.where(real, order[jnp.clip(slots, 0, entries - 1)], -1), latent_N


def scatter_rows(
    blocks: tuple[Int[Array, "N C"], Int[Array, "N"]], weights_BK: Float[Array, "B K"], rows_BD: Float[Array, "B D"], d_sae: int
) -> Float[Array, "F D"]:
    """Sum over (b, k) with indices[b, k] = f of weights[b, k] * rows[b]: the transpose of `weighted_rows`."""
    row_of_entry = jnp.arange(weights_BK.size, dtype=jnp.int32) // weights_BK.shape[1]
    return sums_by(blocks, weights_BK.reshape(-1), rows_BD, row_of_entry, d_sae)


def sums_by(
    blocks: tuple[Int[Array, "N C"], Int[Array, "N"]],
    weights_E: Float[Array, "E"],
    table_RD: Float[Array, "R D"],
    rows_E: Int[Array, "E"],
    size: int,
) -> Float[Array, "size D"]:
    """For each key the sum over its entries e of weights[e] * table[rows[e]]; blocks: `rows_by_latent` of the entries' keys."""
    positions_NC, key_N = blocks
    weights = jnp.where(positions_NC >= 0, weights_E[positions_NC], 0.0)
    partial = weighted_rows(table_RD, rows_E[jnp.maximum(positions_NC, 0)], weights)
    return jnp.zeros((size, table_RD.shape[1]), jnp.float32).at[key_N].add(partial, mode="drop", indices_are_sorted=True)


def topk_encode_sparse(params: Params, x: Float[Array, "... D"], k: int) -> tuple[Float[Array, "... K"], Int[Array, "... K"]]:
    """The k largest pre-activations of each row, then ReLU (Gao et al. 2024, section 2.3): (values, indices)."""

    def encode(rows):
        values, indices = top_k(pre_activations(params, rows), k)
        return jax.nn.relu(values), indices

    return by_platform(encode, x, 4 * params["b_enc"].shape[0])


def reconstruct_dense(
    params: Params, x_BD: Float[Array, "B D"], k: int, centre: bool, shards: int = 1
) -> tuple[Float[Array, "B D"], Float[Array, "B K"], Int[Array, "B K"]]:
    """(x_hat, values, indices) of normalised rows: the definition. centre: subtract b_dec before encoding. shards: the
    devices over which latents are spread."""
    values, indices = sharded_top_k(pre_activations(params, centred(params, x_BD, centre)), k, shards)
    values = jax.nn.relu(values)
    rows = jnp.arange(len(values))[:, None]
    z = jnp.zeros((len(values), params["W_dec"].shape[0]), values.dtype).at[rows, indices].set(values)
    return matmul(z, params["W_dec"]) + params["b_dec"], values, indices


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def reconstruct_sparse(
    params: Params, x_BD: Float[Array, "B D"], k: int, centre: bool
) -> tuple[Float[Array, "B D"], Float[Array, "B K"], Int[Array, "B K"]]:
    """`reconstruct_dense` by gathers, for fp32 parameters."""
    return _forward(params, x_BD, k, centre)[0]


def _forward(params, x, k, centre):
    rows = centred(params, x, centre)
    values, indices = topk_encode_sparse(params, rows, k)
    x_hat = weighted_rows(params["W_dec"], indices, values) + params["b_dec"]
    return (x_hat, values, indices), (params, rows, values, indices)


def _backward(k, centre, saved, cotangents):
    params, rows, values, indices = saved
    d_x_hat, d_values, _ = cotangents
    d_sae = params["W_dec"].shape[0]
    d_pre = jnp.where(values > 0, row_dots(params["W_dec"], indices, d_x_hat) + d_values, 0.0)
    blocks = rows_by_latent(indices, d_sae)
    d_b_enc = jnp.zeros(d_sae, jnp.float32).at[indices].add(d_pre)
    d_b_dec = d_x_hat.sum(axis=0)
    gradients = {
        "W_dec": scatter_rows(blocks, values, d_x_hat, d_sae),
        "W_enc": scatter_rows(blocks, d_pre, rows, d_sae).T,
        "b_enc": d_b_enc,
        "b_dec": d_b_dec - params["W_enc"] @ d_b_enc if centre else d_b_dec,
    }
    return gradients, weighted_rows(params["W_enc"].T, indices, d_pre)


reconstruct_sparse.defvjp(_forward, _backward)
