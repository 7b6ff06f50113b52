"""The standard dictionary: ReLU, made sparse by the L1 norm (Bricken et al. 2023)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae.base import Architecture, Context, Outcome, Params, centred, decoder_norms, dense_outcome, pre_activations
from sae.config import SAEConfig


def encode(params: Params, x: Float[Array, "... D"], cfg: SAEConfig) -> Float[Array, "... F"]:
    """ReLU of the pre-activations."""
    return jax.nn.relu(pre_activations(params, x))


def l1_penalty(params: Params, z: Float[Array, "B F"]) -> Float[Array, "B"]:
    """Sum over latents of the activation times its decoder row's norm: blind to how the two share the scale."""
    return z @ decoder_norms(params)


def train(params: Params, cfg: SAEConfig, x: Array, target: Array, context: Context) -> Outcome:
    """FVU, and the mean L1 penalty over the target's standard deviation."""
    z = encode(params, centred(params, x, cfg.apply_b_dec_to_input), cfg)
    return dense_outcome(params, z, x, target, context, jnp.mean(l1_penalty(params, z)) / jnp.sqrt(context.variance))


RELU = Architecture(encode=encode, train=train, saelens="standard")
