"""The critic of proximal policy optimisation: values, generalised advantages, value loss. Arrays in, arrays out; the policy's part of the
objective is `jaxrl_llm.losses.grpo`.

Sources: PPO, Schulman et al. 2017 (arXiv 1707.06347); generalised advantage estimation, Schulman et al. 2015 (arXiv 1506.02438, eq. 16); the
clip of the values, as in the authors' code (openai/baselines, ppo2): the worse of the clipped and the plain error.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrl_llm.losses.grpo import Totals, batch_totals


def token_values(
    hidden_NTD: Float[Array, "rows seq d_model"], kernel_D: Float[Array, "d_model"], bias: Float[Array, ""]
) -> Float[Array, "rows seq"]:
    """Value of each state, fp32: what the policy expects to earn from there on. hidden_NTD: the states before each token, any float dtype."""
    return jnp.einsum("NTD,D->NT", hidden_NTD, kernel_D, preferred_element_type=jnp.float32) + bias


def gae(
    rewards_NT: Float[Array, "rows seq"],
    values_NT: Float[Array, "rows seq"],
    mask_NT: Bool[Array, "rows seq"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Float[Array, "rows seq"]:
    """Generalised advantages: sum over l of (gamma lam)^l delta_{t+l}, with delta_t = r_t + gamma V_{t+1} - V_t.

    mask_NT: True on a row's tokens, which come first; after the last the value is 0 (a completion that was cut is taken as ended). lam = 1
    gives the return less the value, lam = 0 the error of one step. 0 under the mask.
    """
    mask_NT = mask_NT.astype(bool)
    rewards_NT, values_NT = (jnp.where(mask_NT, x.astype(jnp.float32), 0.0) for x in (rewards_NT, values_NT))

    def earlier(after, now):
        value_after_N, advantage_after_N = after
        reward_N, value_N, mask_N = now
        advantage_N = reward_N + gamma * value_after_N - value_N + gamma * lam * advantage_after_N
        advantage_N = jnp.where(mask_N, advantage_N, 0.0)
        return (value_N, advantage_N), advantage_N

    zero_N = jnp.zeros(mask_NT.shape[0], jnp.float32)
    _, advantages_TN = jax.lax.scan(earlier, (zero_N, zero_N), (rewards_NT.T, values_NT.T, mask_NT.T), reverse=True)
    return advantages_TN.T


def value_loss(
    values_BT: Float[Array, "batch seq"],
    old_values_BT: Float[Array, "batch seq"],
    returns_BT: Float[Array, "batch seq"],
    mask_BT: Bool[Array, "batch seq"],
    *,
    clip: float = 0.2,
    totals: Totals | None = None,
) -> Float[Array, ""]:
    """Mean over tokens of max((V - R)^2, (V_old + clamp(V - V_old, +-clip) - R)^2) / 2.

    old_values_BT: of the policy that sampled; returns_BT: advantages plus old values. clip: 0 means none. totals: counts of the whole batch
    when these rows are one micro-batch of it; the losses then sum to the batch's.
    """
    mask_BT = mask_BT.astype(bool)
    totals = batch_totals(mask_BT) if totals is None else totals
    values_BT, old_BT, returns_BT = (jnp.where(mask_BT, x, 0.0) for x in (values_BT, old_values_BT, returns_BT))
    error_BT = (values_BT - returns_BT) ** 2
    if clip:
        near_BT = old_BT + jnp.clip(values_BT - old_BT, -clip, clip)
        error_BT = jnp.maximum(error_BT, (near_BT - returns_BT) ** 2)
    return 0.5 * jnp.sum(jnp.where(mask_BT, error_BT, 0.0)) / jnp.maximum(totals.tokens, 1.0)
