"""From hidden states to logits: the one function of it, which trainers, samplers and metrics share."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from models.adapted import Adapted, merged
from models.attention import soft_cap
from models.config import ModelConfig
from models.layers import dense

Params = dict[str, Any]


class Head(NamedTuple):
    """The unembedding of one model: call it on final-normed hidden states [..., D] for fp32 logits [..., V].

    kernel_DV: its matrix, adapted or not; bias_V: or None; cap: the logits' soft-cap, or None. Made by `head`.
    """

    kernel_DV: Float[Array, "D V"] | Adapted
    bias_V: Float[Array, " V"] | None
    cap: float | None

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        logits = dense("TD,DV->TV", hidden, self.kernel_DV, jnp.float32)
        if self.bias_V is not None:
            logits = logits + self.bias_V.astype(jnp.float32)
        return soft_cap(logits, self.cap)


def head(cfg: ModelConfig, params: Params) -> Head:
    """All that stands between the hidden states and the logits, tied or not, with bias and soft-cap where the model has them."""
    bias = params["lm_head"]["bias"] if cfg.head_bias else None
    return Head(_kernel(cfg, params), bias, cfg.logit_softcap)


def unembed_matrix(cfg: ModelConfig, params: Params) -> Float[Array, "D V"]:
    """The matrix of the unembedding alone, whether tied or not: directions in the residual stream. For logits use `head` or `unembed`."""
    return merged(_kernel(cfg, params))


def _kernel(cfg: ModelConfig, params: Params) -> Float[Array, "D V"] | Adapted:
    return params["embed"]["embedding"].T if cfg.tie_embeddings else params["lm_head"]["kernel"]


def unembed(cfg: ModelConfig, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """fp32 logits of final-normed hidden states."""
    return head(cfg, params)(hidden)
