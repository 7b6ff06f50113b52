"""The BatchTopK autoencoder's reconstruction and its gradient, computed on the batch's kept latents only.

As `sae.sparse` does it for TopK; but rows keep different numbers of latents, so what is kept is a list of entries, E = B k of them, each with
its row and its latent. Letters: B rows, D d_in, F d_sae, G groups, S entries a group, E kept entries.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sae.base import Params, centred, decoded, pre_activations
from sae.select import cut_for
from sae.sparse import rows_by_latent, sums_by

# On a CPU the gathers are faster from 64 latents for each kept one, since to list the kept ones costs passes over all. ms a step on two
# cores, dense / sparse, at (d_in, d_sae, k, rows): 913 / 513 (768, 6144, 32, 4096), 11 / 10 (96, 1024, 16, 1024), 225 / 191 (256, 4096,
# 32, 2048), 620 / 481 (512, 8192, 64, 2048), 1249 / 876 (1024, 16384, 64, 1024), 280 / 285 (768, 6144, 128, 1024), 87 / 110 (768, 2048,
# 64, 1024).
GATHERS_FROM = 64
GROUP = 16  # latents that are looked at together: most groups have none that is kept
DOT_ENTRIES = 256  # entries whose rows are gathered at a time: they stay in the cache


def kept_of_batch(params: Params, x_BD: Float[Array, "B D"], k: int, centre: bool) -> Float[Array, "B F"]:
    """The B k largest ReLU activations of the batch, and those equal to the least of them, in a dense code of normalised rows."""
    z = jax.nn.relu(pre_activations(params, centred(params, x_BD, centre)))
    return jnp.where(z >= cut_for(lax.stop_gradient(z), z.shape[0] * k), z, 0.0)


def entries_of(z_BF: Float[Array, "B F"], number: int) -> tuple[Float[Array, "E"], Int[Array, "E"], Int[Array, "E"]]:
    """(values, rows, latents) of the first `number` positive entries in order; unused places hold value 0 and row B, latent F.

    In two steps, since looking for few among many costs a pass over the many: first the groups that hold one, then the entries in them.
    """
    B, F = z_BF.shape
    padded = jnp.pad(z_BF, ((0, 0), (0, -F % GROUP)))
    groups_GS = padded.reshape(-1, GROUP)
    (group_E,) = jnp.nonzero(jnp.any(groups_GS > 0, axis=1), size=number, fill_value=len(groups_GS))
    members = groups_GS.at[group_E].get(mode="fill", fill_value=0.0).reshape(-1)
    (place_E,) = jnp.nonzero(members > 0, size=number, fill_value=len(members))
    values = members.at[place_E].get(mode="fill", fill_value=0.0)
    group = group_E.at[place_E // GROUP].get(mode="fill", fill_value=len(groups_GS))
    a_row = padded.shape[1] // GROUP
    row, latent = group // a_row, group % a_row * GROUP + place_E % GROUP
    real = values > 0
    return values, jnp.where(real, row, B).astype(jnp.int32), jnp.where(real, latent, F).astype(jnp.int32)


def entry_dots(a_RD: Array, rows_E: Int[Array, "E"], b_QD: Array, others_E: Int[Array, "E"]) -> Float[Array, "E"]:
    """The dot product of a[rows[e]] with b[others[e]] for every entry; 0 where either is beyond its table."""

    def dot(pair):
        row, other = (table.at[i].get(mode="fill", fill_value=0.0) for table, i in zip((a_RD, b_QD), pair, strict=True))
        return jnp.sum(row * other)

    return lax.map(dot, (rows_E, others_E), batch_size=min(DOT_ENTRIES, len(rows_E)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def reconstruct_batch(
    params: Params, x_BD: Float[Array, "B D"], k: int, centre: bool
) -> tuple[Float[Array, "B D"], Float[Array, "E"], Int[Array, "E"]]:
    """(x_hat, values, latents of the kept entries) for fp32 parameters: `reconstruct_batch_dense` by gathers. Values carry no gradient."""
    return _forward(params, x_BD, k, centre)[0]


def reconstruct_batch_dense(params: Params, x_BD: Array, k: int, centre: bool) -> tuple[Array, Array, Array]:
    """The definition, with the same results."""
    z = kept_of_batch(params, x_BD, k, centre)
    values, _, latents = entries_of(lax.stop_gradient(z), x_BD.shape[0] * k)
    return decoded(params, z, x_BD), values, latents


def _forward(params, x, k, centre):
    rows_BD = centred(params, x, centre)
    z, number = kept_of_batch(params, x, k, centre), len(x) * k
    values, row, latent = entries_of(z, number)
    of_row = rows_by_latent(row, len(x))
    # More entries than E where some equal the least: the dense product then, so that none is lost.
    x_hat = lax.cond(
        jnp.sum(z > 0) > number,
        lambda: decoded(params, z, x),
        lambda: sums_by(of_row, values, params["W_dec"], jnp.minimum(latent, params["W_dec"].shape[0] - 1), len(x)) + params["b_dec"],
    )
    return (x_hat, values, latent), (params, rows_BD, values, row, latent, of_row)


def _backward(k, centre, saved, cotangents):
    params, rows_BD, values, row, latent, of_row = saved
    d_x_hat, d_sae, n = cotangents[0], params["W_dec"].shape[0], len(rows_BD)
    d_pre = jnp.where(values > 0, entry_dots(params["W_dec"], latent, d_x_hat, row), 0.0)
    of_latent, at_row, at_latent = rows_by_latent(latent, d_sae), jnp.minimum(row, n - 1), jnp.minimum(latent, d_sae - 1)
    d_b_enc = jnp.zeros(d_sae, jnp.float32).at[latent].add(d_pre, mode="drop")
    d_b_dec = d_x_hat.sum(axis=0)
    gradients = {
        "W_dec": sums_by(of_latent, values, d_x_hat, at_row, d_sae),
        "W_enc": sums_by(of_latent, d_pre, rows_BD, at_row, d_sae).T,
        "b_enc": d_b_enc,
        "b_dec": d_b_dec - params["W_enc"] @ d_b_enc if centre else d_b_dec,
    }
    return gradients, sums_by(of_row, d_pre, params["W_enc"].T, at_latent, n)


reconstruct_batch.defvjp(_forward, _backward)
