"""The TopK dictionary (Gao et al. 2024, section 2.3): each row keeps its k largest latents."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sae.base import Architecture, Context, Outcome, Params, nothing_to_penalise, pre_activations, unexplained, with_skip
from sae.config import SAEConfig
from sae.select import by_platform, top_k
from sae.sparse import GATHERS_FROM, reconstruct_dense, reconstruct_sparse, topk_encode_sparse


def encode(params: Params, x: Float[Array, "... D"], cfg: SAEConfig) -> Float[Array, "... F"]:
    """Dense rows of `sae.sparse.topk_encode_sparse`."""

    def block(rows):
        pre = pre_activations(params, rows)
        values, indices = jax.lax.stop_gradient(top_k(pre, cfg.k))
        least, last = values[:, -1:], indices[:, -1:]  # of entries equal to the least, the first ones were kept
        kept = (pre > least) | ((pre == least) & (jnp.arange(pre.shape[1]) <= last))
        return jnp.where(kept, jax.nn.relu(pre), 0.0)

    return by_platform(block, x, 4 * params["b_enc"].shape[0])


def train(params: Params, cfg: SAEConfig, x: Array, target: Array, context: Context) -> Outcome:
    """FVU. On one CPU the products may be gathers (`sae.sparse`), on a mesh latents are spread over context.shards devices."""
    own = {name: value for name, value in params.items() if name != "W_skip"}
    k, centre = cfg.k or 0, bool(cfg.apply_b_dec_to_input)
    if context.method == "sparse":
        found: Any = reconstruct_sparse(own, x, k, centre)
    else:
        found = reconstruct_dense(own, x, k, centre, context.shards)
    x_hat, values, indices = found
    x_hat = with_skip(params, x_hat, x)
    return Outcome(
        x_hat=x_hat,
        error=unexplained(target, x_hat, context.variance),
        penalty=nothing_to_penalise(),
        fired=jnp.zeros(cfg.d_sae, bool).at[indices].max(values > 0),
        active=jnp.sum(values > 0),
    )


TOPK = Architecture(encode=encode, train=train, encode_sparse=topk_encode_sparse, saelens="topk", sparse_by="k", gathers_from=GATHERS_FROM)
