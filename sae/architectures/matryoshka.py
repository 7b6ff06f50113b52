"""The Matryoshka BatchTopK dictionary (Bussmann et al. 2025): each prefix of the latents must reconstruct alone.

Early latents stay general since they must do without the later ones; later ones add detail. The error is the mean over the prefixes of
cfg.prefixes and the whole.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from sae.architectures.batchtopk import AXES, encode, finish, least_positive, moved
from sae.base import Architecture, Context, Outcome, Params, matmul, nothing_to_penalise, unexplained, with_skip
from sae.config import SAEConfig
from sae.sparse_batch import kept_of_batch


def train(params: Params, cfg: SAEConfig, x: Array, target: Array, context: Context) -> Outcome:
    """The mean FVU of the nested reconstructions: each is the one before plus its own latents' part."""
    z = kept_of_batch(params, x, cfg.k or 0, bool(cfg.apply_b_dec_to_input))
    x_hat = with_skip(params, jnp.broadcast_to(params["b_dec"].astype(jnp.float32), target.shape), x)
    errors, begin = [], 0
    for end in (*cfg.prefixes, cfg.d_sae):
        x_hat = x_hat + matmul(z[:, begin:end], params["W_dec"][begin:end])
        errors.append(unexplained(target, x_hat, context.variance))
        begin = end
    return Outcome(
        x_hat=x_hat,
        error=jnp.mean(jnp.stack(errors)),
        penalty=nothing_to_penalise(),
        fired=jnp.any(z > 0, axis=0),
        active=jnp.sum(z > 0),
        buffers=moved(params, least_positive(z), context),
    )


MATRYOSHKA = Architecture(
    encode=encode, train=train, saelens="jumprelu", sparse_by="k", axes=AXES, finish=finish, norm_scaled=("b_enc", "threshold")
)
