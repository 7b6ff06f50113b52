"""Supervised fine-tuning: mean negative log-likelihood of the tokens that count, and of a mixture of experts how evenly they are used."""

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


def load_balancing_loss(
    router_logits_LBTE: Float[Array, "layers batch seq experts"], mask_BT: Bool[Array, "batch seq"], experts_per_token: int
) -> Float[Array, ""]:
    """How unevenly a mixture's experts are used (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6, over the tokens of all layers together, as
    transformers' `load_balancing_loss_func`): experts x the sum over experts of the share of tokens that go there x their mean probability.

    It is `experts_per_token` where all are used alike, and at most `experts`. mask_BT: True at real tokens; without one it is 0. The
    shares have no gradient, the probabilities do.
    """
    experts = router_logits_LBTE.shape[-1]
    probs = jax.nn.softmax(router_logits_LBTE.astype(jnp.float32), axis=-1)
    chosen = jax.lax.top_k(probs, experts_per_token)[1]
    real = jnp.broadcast_to(mask_BT, chosen.shape[:-1]).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(real), 1.0)
    shares_E = jnp.zeros(experts).at[chosen.reshape(-1)].add(jnp.repeat(real.reshape(-1), experts_per_token)) / count
    means_E = jnp.sum(probs * real[..., None], axis=(0, 1, 2)) / count
    return experts * jnp.sum(jax.lax.stop_gradient(shares_E) * means_E)
