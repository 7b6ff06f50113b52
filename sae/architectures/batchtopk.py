"""The BatchTopK dictionary (Bussmann et al. 2024): a batch keeps k latents a row on average, each row as many as it needs.

In training the batch's B k largest activations stay. The least of them, averaged over steps, is the threshold by which single rows are
encoded afterwards: the trained dictionary is a JumpReLU one with the same threshold for all latents (SAELens's convention too).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sae.architectures.jumprelu import AXES, encode
from sae.base import Architecture, Context, Outcome, Params, centred, dense_outcome, nothing_to_penalise, pre_activations
from sae.config import SAEConfig
from sae.select import cut_for


def kept_of_batch(params: Params, cfg: SAEConfig, x: Float[Array, "B D"]) -> tuple[Float[Array, "B F"], Float[Array, ""]]:
    """(z, its least positive entry): the B k largest ReLU activations of the batch, and those equal to the least of them."""
    z = jax.nn.relu(pre_activations(params, centred(params, x, cfg.apply_b_dec_to_input)))
    z = jnp.where(z >= cut_for(lax.stop_gradient(z), z.shape[0] * (cfg.k or 0)), z, 0.0)
    return z, jnp.min(jnp.where(z > 0, lax.stop_gradient(z), jnp.inf))


def moved(params: Params, least: Float[Array, ""], context: Context) -> Params:
    """The threshold after a batch whose least kept activation was `least`: a running mean, begun at the first batch."""
    before = params["threshold"]
    after = context.threshold_decay * before + (1.0 - context.threshold_decay) * least
    after = jnp.where(before > 0, after, least)
    return {"threshold": jnp.where(jnp.isfinite(least), after, before)}


def train(params: Params, cfg: SAEConfig, x: Array, target: Array, context: Context) -> Outcome:
    """FVU of the batch's kept latents."""
    z, least = kept_of_batch(params, cfg, x)
    return dense_outcome(params, z, x, target, context, nothing_to_penalise(), buffers=moved(params, least, context))


def finish(params: Params, cfg: SAEConfig) -> tuple[Params, SAEConfig]:
    """The JumpReLU dictionary that encodes one row at a time."""
    return params, cfg.replace(architecture="jumprelu", k=None, prefixes=())


BATCHTOPK = Architecture(
    encode=encode, train=train, saelens="jumprelu", sparse_by="k", axes=AXES, finish=finish, norm_scaled=("b_enc", "threshold")
)
