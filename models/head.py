"""From hidden states to logits: the one function of it, which trainers, samplers and metrics share."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.adapted import Adapted, merged
from models.attention import soft_cap
from models.config import ModelConfig
from models.layers import BATCH_AXES, constrain, dense, mesh_of

Params = dict[str, Any]


class Head(NamedTuple):
    """The unembedding of one model: call it on final-normed hidden states [..., D] for fp32 logits [..., V].

    kernel_DV: its matrix, adapted or not; bias_V: or None; cap: the logits' soft-cap, or None. Made by `head`.
    """

    kernel_DV: Float[Array, "D V"] | Adapted
    bias_V: Float[Array, " V"] | None
    cap: float | None

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        return _logits(hidden, self.kernel_DV, self.bias_V, self.cap)

    def spread(self) -> Head | SpreadHead:
        """The same function for a loop over chunks of a batch whose rows are spread over a mesh; itself where its parameters are on none."""
        mesh = mesh_of(self.kernel_DV)
        ways = math.prod(mesh.shape[name] for name in BATCH_AXES if name in mesh.shape)
        if ways == 1:
            return self
        copy = lambda a, *axes: constrain(jnp.broadcast_to(a, (ways, *a.shape)), self.kernel_DV, BATCH_AXES, *axes)  # noqa: E731
        tensor = ("tensor",) if "tensor" in mesh.shape else ()
        kernel = self.kernel_DV
        if isinstance(kernel, Adapted):
            copies: Any = Adapted(copy(kernel.base, (), tensor), copy(kernel.a, (), ()), copy(kernel.b, (), tensor), kernel.scale)
        else:
            copies = copy(kernel, (), tensor)
        return SpreadHead(self, copies, None if self.bias_V is None else copy(self.bias_V, tensor))


class SpreadHead(NamedTuple):
    """A `Head` with a copy of its parameters for each group of devices that has rows of its own: call it on [rows, ..., D].

    The gradient by a copy stays on its devices, so that a loop over chunks adds them up where they are and they are summed over the devices
    once, after it. With the one matrix, the partitioner sums a gradient as large as it over all devices in every round of the loop.
    """

    whole: Head
    kernels_WDV: Float[Array, "W D V"] | Adapted  # W copies
    biases_WV: Float[Array, "W V"] | None

    def __call__(self, hidden: Float[Array, "B ... D"]) -> Float[Array, "B ... V"]:
        ways = self.kernels_WDV.shape[0]
        if hidden.shape[0] % ways:
            return self.whole(hidden)
        logits_of = functools.partial(_logits, cap=self.whole.cap)
        logits = jax.vmap(logits_of)(hidden.reshape(ways, -1, *hidden.shape[1:]), self.kernels_WDV, self.biases_WV)
        return logits.reshape(*hidden.shape[:-1], -1)


def _logits(hidden, kernel_DV, bias_V, cap):
    logits = dense("TD,DV->TV", hidden, kernel_DV, jnp.float32)
    if bias_V is not None:
        logits = logits + bias_V.astype(jnp.float32)
    return soft_cap(logits, cap)


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
