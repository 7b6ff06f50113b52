"""The gated dictionary (Rajamanoharan et al. 2024a): whether a latent fires and how strongly are told apart.

    gate = x W_enc + b_gate,  z = [gate > 0] * ReLU((x W_enc) exp(r_mag) + b_mag)

L1 acts on ReLU(gate) alone, so it does not shrink z; a second reconstruction, from ReLU(gate) by the frozen decoder, teaches the gate.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sae.architectures.relu import l1_penalty
from sae.base import Architecture, Context, Outcome, Params, centred, decoded, dense_outcome, matmul, unexplained
from sae.config import SAEConfig

AXES = {
    "W_enc": ("d_in", "d_sae"),
    "b_gate": ("d_sae",),
    "b_mag": ("d_sae",),
    "r_mag": ("d_sae",),
    "W_dec": ("d_sae", "out"),
    "b_dec": ("out",),
}


def gate_and_code(params: Params, x: Float[Array, "... D"]) -> tuple[Float[Array, "... F"], Float[Array, "... F"]]:
    """(ReLU of the gate's pre-activations, z) of normalised and centred rows."""
    projected = matmul(x, params["W_enc"])
    gate, b_mag, r_mag = (params[name].astype(jnp.float32) for name in ("b_gate", "b_mag", "r_mag"))
    gate = projected + gate
    return jax.nn.relu(gate), jnp.where(gate > 0, jax.nn.relu(projected * jnp.exp(r_mag) + b_mag), 0.0)


def encode(params: Params, x: Float[Array, "... D"], cfg: SAEConfig) -> Float[Array, "... F"]:
    """The magnitudes of the latents whose gates are open."""
    return gate_and_code(params, x)[1]


def train(params: Params, cfg: SAEConfig, x: Array, target: Array, context: Context) -> Outcome:
    """FVU of z, plus FVU of the gate's own reconstruction, plus the gate's L1 penalty over the target's standard deviation."""
    gate, z = gate_and_code(params, centred(params, x, cfg.apply_b_dec_to_input))
    outcome = dense_outcome(params, z, x, target, context, jnp.mean(l1_penalty(params, gate)) / jnp.sqrt(context.variance))
    frozen = lax.stop_gradient({name: value for name, value in params.items() if name in ("W_dec", "b_dec", "W_skip")})
    return outcome._replace(error=outcome.error + unexplained(target, decoded(frozen, gate, x), context.variance))


GATED = Architecture(
    encode=encode, train=train, saelens="gated", axes=AXES, norm_scaled=("b_gate", "b_mag"), dead_bias="b_gate"
)  # r_mag is a logarithm of a factor, which no scale of W_enc changes
