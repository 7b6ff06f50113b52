"""What a dictionary is trained to lower: reconstruction error, sparsity penalty, auxiliary loss of dead latents.

Letters: B rows, D d_in, F d_sae, K kept latents, A dead latents looked at.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from sae.architectures import Params, matmul
from sae.config import SAEConfig
from sae.dictionary import architecture
from sae.sparse import centred, reconstruct_dense, reconstruct_sparse


def loss(
    params: Params,
    cfg: SAEConfig,
    x_BD: Float[Array, "B D"],
    dead_F: Bool[Array, "F"],
    *,
    variance: Array | float,
    l1: Array | float,
    aux: Array | float,
    aux_k: int,
    method: str,
    shards: int = 1,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """(loss, parts) of normalised rows:

        mean |x - x_hat|^2 / variance + l1 * mean penalty(z) / sqrt(variance) + aux * AuxK

    variance makes the first term a fraction of variance unexplained and the whole blind to the activations' scale.
    aux_k: 0 leaves AuxK out. method: for TopK, "dense" or "sparse" products (sae.sparse), the
    dense ones for latents spread over `shards` devices. Parts: fvu, l0, l1, aux, fired (bool [F]).
    """
    arch = architecture(cfg)
    if arch.is_topk:
        if method == "sparse":
            found: Any = reconstruct_sparse(params, x_BD, cfg.k, cfg.apply_b_dec_to_input)
        else:
            found = reconstruct_dense(params, x_BD, cfg.k, cfg.apply_b_dec_to_input, shards)
        x_hat, values, indices = found
        fired = jnp.zeros(cfg.d_sae, bool).at[indices].max(values > 0)
        active = jnp.sum(values > 0)
        penalty = jnp.float32(0.0)
    else:
        z = arch.encode(params, centred(params, x_BD, cfg.apply_b_dec_to_input), cfg.k)
        x_hat = matmul(z, params["W_dec"]) + params["b_dec"]
        fired, active = jnp.any(z > 0, axis=0), jnp.sum(z > 0)
        penalty = jnp.float32(0.0) if arch.penalty is None else jnp.mean(arch.penalty(params, z)) / jnp.sqrt(variance)
    fvu = jnp.mean(jnp.sum((x_BD - x_hat) ** 2, axis=1)) / variance
    auxiliary = jnp.float32(0.0)
    if aux_k:
        residual = lax.stop_gradient(x_BD - x_hat)
        auxiliary = aux_k_loss(params, centred(params, x_BD, cfg.apply_b_dec_to_input), residual, dead_F, aux_k)
    total = fvu + l1 * penalty + aux * auxiliary
    return total, {"fvu": fvu, "l1": penalty, "aux": auxiliary, "l0": active / x_BD.shape[0], "fired": fired}


def aux_k_loss(
    params: Params, rows_BD: Float[Array, "B D"], residual_BD: Float[Array, "B D"], dead_F: Bool[Array, "F"], aux_k: int
) -> Float[Array, ""]:
    """AuxK (Gao et al. 2024, appendix A.2, as scaled in dictionary_learning): the fraction of the residual's variance
    that the aux_k most active dead latents of each row leave unexplained, decoded without bias. 0 with none dead.

    Work follows the number of dead latents: the smallest of a few static sizes that holds them all is run.
    """
    d_sae = dead_F.shape[0]
    sizes = [min(aux_k, d_sae)]
    while sizes[-1] < d_sae:
        sizes.append(min(4 * sizes[-1], d_sae))
    number = jnp.sum(dead_F)
    branch = jnp.where(number == 0, 0, 1 + jnp.searchsorted(jnp.asarray(sizes), number))
    branches = [lambda *_: jnp.float32(0.0)]
    branches += [lambda p, r, e, d, size=size: aux_k_loss_sized(p, r, e, d, aux_k, size) for size in sizes]
    return lax.switch(branch, branches, params, rows_BD, residual_BD, dead_F)


def aux_k_loss_sized(params, rows_BD, residual_BD, dead_F, aux_k, size):
    """`aux_k_loss` when at most `size` latents are dead."""
    (dead_A,) = jnp.nonzero(dead_F, size=size, fill_value=dead_F.shape[0])
    encoder_DA = params["W_enc"].at[:, dead_A].get(mode="fill", fill_value=0.0)
    decoder_AD = params["W_dec"].at[dead_A].get(mode="fill", fill_value=0.0)
    bias_A = params["b_enc"].at[dead_A].get(mode="fill", fill_value=0.0)
    z_BA = jax.nn.relu(matmul(rows_BD, encoder_DA) + bias_A)  # padding latents are 0 and decode to 0
    if size > aux_k:  # else every dead latent is among the aux_k largest
        floor_B1 = lax.top_k(lax.stop_gradient(z_BA), aux_k)[0][:, -1:]
        z_BA = jnp.where(z_BA >= floor_B1, z_BA, 0.0)
    error = jnp.mean(jnp.sum((residual_BD - matmul(z_BA, decoder_AD)) ** 2, axis=1))
    spread = jnp.mean(jnp.sum((residual_BD - residual_BD.mean(axis=0)) ** 2, axis=1))
    return jnp.where(spread > 0, error / jnp.where(spread > 0, spread, 1.0), 0.0)


def default_learning_rate(d_sae: int) -> float:
    """2e-4 / sqrt(d_sae / 2^14) (Gao et al. 2024, section 3)."""
    return 2e-4 / math.sqrt(d_sae / 2**14)
