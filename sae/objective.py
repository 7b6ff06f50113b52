"""What a dictionary is trained to lower: reconstruction error, sparsity penalty, auxiliary loss of dead latents.

Letters: B rows, D d_in, E width of what is reconstructed, F d_sae, A dead latents looked at.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from sae.base import Context, Params, centred, matmul, unexplained
from sae.config import SAEConfig
from sae.dictionary import architecture


def loss(
    params: Params,
    cfg: SAEConfig,
    x_BD: Float[Array, "B D"],
    target_BE: Float[Array, "B E"],
    dead_F: Bool[Array, "F"],
    context: Context,
    *,
    sparsity: Array | float,
    aux: Array | float,
    aux_k: int,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """(loss, parts) of rows and targets as `dictionary.training_pair` gives them:

        the architecture's error + sparsity * its penalty + aux * AuxK

    The error is the fraction of the target's variance unexplained, with whatever the architecture adds to it; all three are blind to
    the activations' scale. aux_k: 0 leaves AuxK out. Parts: fvu, l0, sparsity, aux, fired (bool [F]), buffers (new values of parameters that
    are measured).
    """
    arch = architecture(cfg)
    found = arch.train(params, cfg, x_BD, target_BE, context)
    auxiliary = jnp.float32(0.0)
    if aux_k:
        residual = lax.stop_gradient(target_BE - found.x_hat)
        rows = centred(params, x_BD, bool(cfg.apply_b_dec_to_input))
        auxiliary = aux_k_loss(params, rows, residual, dead_F, aux_k, arch.dead_bias)
    total = found.error + sparsity * found.penalty + aux * auxiliary
    parts = {
        "fvu": unexplained(target_BE, found.x_hat, context.variance),
        "sparsity": found.penalty,
        "aux": auxiliary,
        "l0": found.active / x_BD.shape[0],
        "fired": found.fired,
        "buffers": found.buffers or {},
    }
    return total, parts


def aux_k_loss(
    params: Params,
    rows_BD: Float[Array, "B D"],
    residual_BE: Float[Array, "B E"],
    dead_F: Bool[Array, "F"],
    aux_k: int,
    bias: str = "b_enc",
) -> Float[Array, ""]:
    """AuxK (Gao et al. 2024, appendix A.2, as scaled in dictionary_learning): the fraction of the residual's variance
    that the aux_k most active dead latents of each row leave unexplained, decoded without bias. 0 with none dead. bias: the
    parameter that is added to a dead latent's projection.

    Work follows the number of dead latents: the smallest of a few static sizes that holds them all is run.
    """
    d_sae = dead_F.shape[0]
    sizes = [min(aux_k, d_sae)]
    while sizes[-1] < d_sae:
        sizes.append(min(4 * sizes[-1], d_sae))
    number = jnp.sum(dead_F)
    branch = jnp.where(number == 0, 0, 1 + jnp.searchsorted(jnp.asarray(sizes), number))
    branches = [lambda *_: jnp.float32(0.0)]
    branches += [lambda p, r, e, d, size=size: aux_k_loss_sized(p, r, e, d, aux_k, size, bias) for size in sizes]
    return lax.switch(branch, branches, params, rows_BD, residual_BE, dead_F)


def aux_k_loss_sized(params, rows_BD, residual_BE, dead_F, aux_k, size, bias):
    """`aux_k_loss` when at most `size` latents are dead."""
    (dead_A,) = jnp.nonzero(dead_F, size=size, fill_value=dead_F.shape[0])
    encoder_DA = params["W_enc"].at[:, dead_A].get(mode="fill", fill_value=0.0)
    decoder_AE = params["W_dec"].at[dead_A].get(mode="fill", fill_value=0.0)
    bias_A = params[bias].at[dead_A].get(mode="fill", fill_value=0.0)
    z_BA = jax.nn.relu(matmul(rows_BD, encoder_DA) + bias_A)  # padding latents are 0 and decode to 0
    if size > aux_k:  # else every dead latent is among the aux_k largest
        floor_B1 = lax.top_k(lax.stop_gradient(z_BA), aux_k)[0][:, -1:]
        z_BA = jnp.where(z_BA >= floor_B1, z_BA, 0.0)
    error = jnp.mean(jnp.sum((residual_BE - matmul(z_BA, decoder_AE)) ** 2, axis=1))
    spread = jnp.mean(jnp.sum((residual_BE - residual_BE.mean(axis=0)) ** 2, axis=1))
    return jnp.where(spread > 0, error / jnp.where(spread > 0, spread, 1.0), 0.0)

