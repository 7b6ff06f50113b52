"""One row a dictionary architecture: its parameters, its encoder and its sparsity penalty.

To add one, write its row here; encode, decode, training, sharding, saving and loading read nothing else. Letters:
B rows, D d_in, F d_sae, K kept latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sae.select import by_platform, top_k

Params = dict[str, Array]

BASE_AXES = {"W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}


def matmul(x: Array, kernel: Array) -> Array:
    """x @ kernel over x's last axis, accumulated in fp32 and returned in fp32."""
    return jnp.einsum("...d,df->...f", x, kernel, preferred_element_type=jnp.float32)


def pre_activations(params: Params, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    """x W_enc + b_enc in fp32; x is already normalised and centred."""
    return matmul(x, params["W_enc"]) + params["b_enc"].astype(jnp.float32)


def relu_encode(params: Params, x: Array, k: int | None) -> Array:
    """ReLU of the pre-activations (Bricken et al. 2023)."""
    return jax.nn.relu(pre_activations(params, x))


def topk_encode_sparse(params: Params, x: Float[Array, "... D"], k: int) -> tuple[Float[Array, "... K"], Int[Array, "... K"]]:
    """The k largest pre-activations of each row, then ReLU (Gao et al. 2024, section 2.3): (values, indices)."""

    def encode(rows):
        values, indices = top_k(pre_activations(params, rows), k)
        return jax.nn.relu(values), indices

    return by_platform(encode, x, 4 * params["b_enc"].shape[0])


def topk_encode(params: Params, x: Float[Array, "... D"], k: int) -> Float[Array, "... F"]:
    """Dense rows of `topk_encode_sparse`."""

    def encode(rows):
        pre = pre_activations(params, rows)
        values, indices = jax.lax.stop_gradient(top_k(pre, k))
        least, last = values[:, -1:], indices[:, -1:]  # of entries equal to the least, the first ones were kept
        kept = (pre > least) | ((pre == least) & (jnp.arange(pre.shape[1]) <= last))
        return jnp.where(kept, jax.nn.relu(pre), 0.0)

    return by_platform(encode, x, 4 * params["b_enc"].shape[0])


def l1_penalty(params: Params, z: Float[Array, "B F"]) -> Float[Array, "B"]:
    """Sum over latents of the activation times its decoder row's norm: blind to how the two share the scale."""
    return z @ jnp.linalg.norm(params["W_dec"].astype(jnp.float32), axis=1)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How one kind of dictionary encodes; decoding is z W_dec + b_dec for all.

    axes: the parameters and the logical axes of each, from which shapes, initial values and shardings derive.
    encode(params, x, k) -> z and, where the code has at most k non-zeros a row, encode_sparse(params, x, k) ->
    (values, indices); x is normalised and centred, [..., D]. penalty(params, z) -> [B] multiplies l1_coefficient.
    saelens: the architecture's name in SAELens's cfg.json. is_topk: encode_sparse is `topk_encode_sparse`, so that training may take
    the products of `sae.sparse`, which do the same; any other row is trained by differentiating `encode`.
    """

    encode: Callable[[Params, Array, int | None], Array]
    saelens: str
    is_topk: bool = False
    encode_sparse: Callable[[Params, Array, int], tuple[Array, Array]] | None = None
    penalty: Callable[[Params, Array], Array] | None = None
    axes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(BASE_AXES))

    @property
    def needs_k(self) -> bool:
        """True when every row keeps a fixed number of latents."""
        return self.encode_sparse is not None


ARCHITECTURES: dict[str, Architecture] = {
    "topk": Architecture(encode=topk_encode, encode_sparse=topk_encode_sparse, saelens="topk", is_topk=True),
    "relu": Architecture(encode=relu_encode, penalty=l1_penalty, saelens="standard"),
}
