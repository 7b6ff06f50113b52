"""Supervised fine-tuning: mean negative log-likelihood of the tokens that count."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def sft_loss(
    logps_BT: Float[Array, "batch seq"],
    mask_BT: Bool[Array, "batch seq"],
    *,
    total_tokens: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean of -log p over masked-in tokens (nats a token); `perplexity`'s log, in metrics as "nll".

    logps_BT: log-probability of each target token. mask_BT: True where the token is trained on. total_tokens: the count over the
    whole batch when these rows are one micro-batch; losses then sum to the batch's. A batch with no such token has loss 0.
    """
    mask_BT = mask_BT.astype(bool)
    count = jnp.sum(mask_BT, dtype=jnp.float32) if total_tokens is None else total_tokens
    loss = -jnp.sum(jnp.where(mask_BT, logps_BT, 0.0)) / jnp.maximum(count, 1.0)
    return loss, {"nll": jax.lax.stop_gradient(loss)}
