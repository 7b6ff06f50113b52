"""The JumpReLU dictionary (Rajamanoharan et al. 2024b): a latent fires above a threshold of its own.

    z = pre * [pre > threshold] * [pre > 0]

Steps have no gradient, so a rectangle of width `bandwidth` around the threshold stands for theirs (equations 11 and 12 there). The penalty
is the number of active latents ("step"), its square distance to a target in units of that target, or a sum of tanh(c z |W_dec|), which
also reaches latents far from their threshold ("tanh", Anthropic, January 2025 update; there the step passes its gradient to the
pre-activation too).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sae.base import BASE_AXES, Architecture, Context, Outcome, Params, centred, decoder_norms, dense_outcome, pre_activations, step_gradient
from sae.config import SAEConfig

AXES = {**BASE_AXES, "threshold": ("d_sae",)}


def encode(params: Params, x: Float[Array, "... D"], cfg: SAEConfig) -> Float[Array, "... F"]:
    """The pre-activations above their threshold, and above 0."""
    pre = pre_activations(params, x)
    return jnp.where(pre > params["threshold"].astype(jnp.float32), jax.nn.relu(pre), 0.0)


def gated_by_threshold(pre: Array, threshold: Array, bandwidth: Array | float, to_input: bool = False) -> Array:
    """`encode`'s step with a gradient for the threshold: dz/dthreshold = -threshold / bandwidth within the rectangle. to_input: the step
    also has the opposite gradient for the pre-activation."""
    z = jnp.where(lax.stop_gradient(pre > threshold), jax.nn.relu(pre), 0.0)
    slope = lax.stop_gradient(-threshold * step_gradient(pre, threshold, bandwidth))
    moved = threshold - pre if to_input else threshold
    return z + slope * (moved - lax.stop_gradient(moved))


def active(pre: Array, threshold: Array, bandwidth: Array | float) -> Float[Array, "B"]:
    """Active latents of each row, with the gradient -1 / bandwidth within the rectangle for each threshold."""
    slope = lax.stop_gradient(-step_gradient(pre, threshold, bandwidth))
    fires = lax.stop_gradient(((pre > threshold) & (pre > 0)).astype(jnp.float32))
    return jnp.sum(fires + slope * (threshold - lax.stop_gradient(threshold)), axis=1)


def train(params: Params, cfg: SAEConfig, x: Array, target: Array, context: Context) -> Outcome:
    """FVU and one of the penalties above; with `pre_act`, dead latents are drawn towards their threshold."""
    pre = pre_activations(params, centred(params, x, cfg.apply_b_dec_to_input))
    threshold, width = params["threshold"].astype(jnp.float32), context.bandwidth * context.unit
    z = gated_by_threshold(pre, threshold, width, to_input=context.penalty == "tanh")
    if context.penalty == "tanh":
        penalty = jnp.mean(jnp.sum(jnp.tanh(context.tanh_scale * z * decoder_norms(params) / context.unit), axis=1))
    else:
        l0 = jnp.mean(active(pre, threshold, width))
        aim = jnp.maximum(context.target_l0, 1e-9)
        penalty = jnp.where(context.target_l0 > 0, (l0 / aim - 1.0) ** 2, l0)
    outcome = dense_outcome(params, z, x, target, context, penalty)
    if context.dead_F is None:
        return outcome
    short = jax.nn.relu(threshold - pre) * context.dead_F * decoder_norms(params)
    return outcome._replace(error=outcome.error + context.pre_act * jnp.mean(jnp.sum(short, axis=1)) / jnp.sqrt(context.variance))


def start(cfg: SAEConfig, unit: float, threshold: float) -> Params:
    """Every threshold at `threshold` units."""
    return {"threshold": jnp.full(cfg.d_sae, threshold * unit, jnp.float32)}


JUMPRELU = Architecture(encode=encode, train=train, saelens="jumprelu", axes=AXES, start=start, norm_scaled=("b_enc", "threshold"))
