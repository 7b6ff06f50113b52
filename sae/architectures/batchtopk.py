"""The BatchTopK dictionary (Bussmann et al. 2024): a batch keeps k latents a row on average, each row as many as it needs.

In training the batch's B k largest activations stay. The least of them, averaged over steps, is the threshold by which single rows are
encoded afterwards: the trained dictionary is a JumpReLU one with the same threshold for all latents (SAELens's convention too).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sae.architectures.jumprelu import AXES, encode
from sae.base import Architecture, Context, Outcome, Params, dense_outcome, nothing_to_penalise, unexplained, with_skip
from sae.config import SAEConfig
from sae.sparse_batch import GATHERS_FROM, kept_of_batch, reconstruct_batch


def least_positive(z: Array) -> Float[Array, ""]:
    """The least entry above 0; infinity where there is none."""
    return jnp.min(jnp.where(z > 0, lax.stop_gradient(z), jnp.inf))


def moved(params: Params, least: Float[Array, ""], context: Context) -> Params:
    """The threshold after a batch whose least kept activation was `least`: a running mean, begun at the first batch."""
    before = params["threshold"]
    after = context.threshold_decay * before + (1.0 - context.threshold_decay) * least
    after = jnp.where(before > 0, after, least)
    return {"threshold": jnp.where(jnp.isfinite(least), after, before)}


def train(params: Params, cfg: SAEConfig, x: Array, target: Array, context: Context) -> Outcome:
    """FVU of the batch's kept latents; on one CPU the products may be gathers (`sae.sparse_batch`)."""
    k, centre = cfg.k or 0, bool(cfg.apply_b_dec_to_input)
    if context.method != "sparse":
        z = kept_of_batch(params, x, k, centre)
        return dense_outcome(params, z, x, target, context, nothing_to_penalise(), buffers=moved(params, least_positive(z), context))
    own = {name: params[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    found: Any = reconstruct_batch(own, x, k, centre)
    x_hat, values, latents = found
    x_hat = with_skip(params, x_hat, x)
    return Outcome(
        x_hat=x_hat,
        error=unexplained(target, x_hat, context.variance),
        penalty=nothing_to_penalise(),
        fired=jnp.zeros(cfg.d_sae, bool).at[latents].max(values > 0, mode="drop"),
        active=jnp.sum(values > 0),
        buffers=moved(params, least_positive(values), context),
    )


def finish(params: Params, cfg: SAEConfig) -> tuple[Params, SAEConfig]:
    """The JumpReLU dictionary that encodes one row at a time."""
    return params, cfg.replace(architecture="jumprelu", k=None, prefixes=())


BATCHTOPK = Architecture(
    encode=encode,
    train=train,
    saelens="jumprelu",
    sparse_by="k",
    axes=AXES,
    finish=finish,
    norm_scaled=("b_enc", "threshold"),
    gathers_from=GATHERS_FROM,
)
