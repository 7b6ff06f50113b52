"""What every dictionary architecture is made of: its products, its errors, and the description of one (`Architecture`).

Letters: B rows, D d_in, E width of what is reconstructed (d_in, or a transcoder's d_out), F d_sae, K kept latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sae.config import SAEConfig

Params = dict[str, Array]

BASE_AXES = {"W_enc": ("d_in", "d_sae"), "b_enc": ("d_sae",), "W_dec": ("d_sae", "out"), "b_dec": ("out",)}
SKIP_AXES = {"W_skip": ("d_in", "out")}


def product_dtype(kernel: Array) -> Any:
    """The dtype of a product's operands: the kernel's, or fp32 where that is fp16, which activations above 65,504 would overflow."""
    return jnp.float32 if kernel.dtype == jnp.float16 else kernel.dtype


def matmul(x: Array, kernel: Array) -> Array:
    """x @ kernel over x's last axis with operands in `product_dtype`, accumulated in fp32 and returned in fp32."""
    dtype = product_dtype(kernel)
    return jnp.einsum("...d,df->...f", x.astype(dtype), kernel.astype(dtype), preferred_element_type=jnp.float32)


def pre_activations(params: Params, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    """x W_enc + b_enc in fp32; x is already normalised and centred."""
    return matmul(x, params["W_enc"]) + params["b_enc"].astype(jnp.float32)


def centred(params: Params, x: Float[Array, "... D"], centre: bool) -> Float[Array, "... D"]:
    """The encoder's input: normalised x less the decoder's bias if `centre` (cfg.apply_b_dec_to_input)."""
    return x - params["b_dec"].astype(x.dtype) if centre else x


def decoded(params: Params, z: Float[Array, "... F"], x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    """z W_dec + b_dec, and x W_skip where there is one, in fp32; x is normalised, not centred."""
    return with_skip(params, matmul(z, params["W_dec"]) + params["b_dec"].astype(jnp.float32), x)


def with_skip(params: Params, x_hat: Float[Array, "... E"], x: Float[Array, "... D"] | None) -> Float[Array, "... E"]:
    """x_hat with the linear skip of a skip transcoder (Paulo et al. 2025), where there is one."""
    return x_hat + matmul(x, params["W_skip"]) if "W_skip" in params else x_hat


def decoder_norms(params: Params) -> Float[Array, "F"]:
    """The norm of each decoder row, fp32; 0, with no gradient, for a row of zeros."""
    squares = jnp.sum(params["W_dec"].astype(jnp.float32) ** 2, axis=1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def unexplained(target_BE: Float[Array, "B E"], x_hat_BE: Float[Array, "B E"], variance: Array | float) -> Float[Array, ""]:
    """Mean squared error of a row over `variance`: the fraction of variance unexplained (FVU)."""
    return jnp.mean(jnp.sum((target_BE - x_hat_BE) ** 2, axis=1)) / variance


class Context(NamedTuple):
    """What a training forward may read beside parameters and rows.

    variance: of the target (summed over its width), which makes the loss blind to its scale. unit: the root mean square of a coordinate of
    the target, in which latents, and so `bandwidth`, are measured. target_l0: 0, or the active latents a row to aim at ("jumprelu"). dead_F: which
    latents count as dead. method, shards: how TopK's products are made, see sae.sparse. penalty: "step" or "tanh" ("jumprelu").
    """

    variance: Array | float
    unit: Array | float = 1.0
    bandwidth: Array | float = 0.05
    target_l0: Array | float = 0.0
    tanh_scale: Array | float = 4.0
    pre_act: Array | float = 0.0
    threshold_decay: Array | float = 0.99
    dead_F: Bool[Array, "F"] | None = None
    method: str = "dense"
    shards: int = 1
    penalty: str = "step"


class Outcome(NamedTuple):
    """What an architecture's training forward gives.

    x_hat: the reconstruction of the (normalised) target. error: the reconstruction's part of the loss. penalty: what
    sparsity_coefficient multiplies. fired: bool [F], which latents fired in the batch; active: how many in all rows together.
    buffers: new values of parameters that are measured and not learned.
    """

    x_hat: Float[Array, "B E"]
    error: Float[Array, ""]
    penalty: Float[Array, ""]
    fired: Bool[Array, "F"]
    active: Int[Array, ""]
    buffers: dict[str, Array] | None = None


def dense_outcome(
    params: Params, z_BF: Float[Array, "B F"], x_BD: Array, target_BE: Array, context: Context, penalty: Array | float = 0.0, **changes: Any
) -> Outcome:
    """The outcome of a dense code z whose error is the FVU; `changes` replace fields."""
    x_hat = decoded(params, z_BF, x_BD)
    outcome = Outcome(
        x_hat=x_hat,
        error=unexplained(target_BE, x_hat, context.variance),
        penalty=jnp.asarray(penalty, jnp.float32),
        fired=jnp.any(z_BF > 0, axis=0),
        active=jnp.sum(z_BF > 0),
    )
    return outcome._replace(**changes)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One kind of dictionary; decoding is z W_dec + b_dec for all.

    encode(params, x, cfg) -> z and, where the code has at most k non-zeros a row, encode_sparse(params, x, k) ->
    (values, indices); x is normalised and centred, [..., D].
    train(params, cfg, x, target, context) -> Outcome: the forward of training, differentiated; x [B, D] is normalised, not centred.
    saelens: the architecture's name in SAELens's cfg.json (None: it cannot be saved so).
    axes: the parameters and the logical axes of each, from which shapes and shardings derive.
    start(cfg, unit) -> initial values of parameters beyond zeros, W_enc and W_dec; unit as in Context, threshold as in SAETrainConfig.
    norm_scaled: parameters that grow with W_enc when norms of decoder rows are moved into it.
    finish(params, cfg) -> (params, cfg) of the trained dictionary, where training and use differ.
    sparse_by: what makes it sparse: "k", or "penalty" (then sparsity_coefficient must be positive, and no AuxK is published).
    dead_bias: the bias by which AuxK reads dead latents. gathers_from: `train` can work on the kept latents
    alone (context.method "sparse"), and on a CPU is faster so from so many latents for each kept one; 0: it cannot.
    """

    encode: Callable[[Params, Array, SAEConfig], Array]
    train: Callable[[Params, SAEConfig, Array, Array, Context], Outcome]
    saelens: str | None
    sparse_by: str = "penalty"
    encode_sparse: Callable[[Params, Array, int], tuple[Array, Array]] | None = None
    axes: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: dict(BASE_AXES))
    start: Callable[[SAEConfig, float, float], Params] | None = None
    norm_scaled: tuple[str, ...] = ("b_enc",)
    finish: Callable[[Params, SAEConfig], tuple[Params, SAEConfig]] | None = None
    dead_bias: str = "b_enc"
    gathers_from: int = 0

    @property
    def needs_k(self) -> bool:
        """True when the number of kept latents is part of the description."""
        return self.sparse_by == "k"

    @property
    def aux(self) -> float:
        """The published weight of AuxK, the loss that wakes dead latents (Gao et al. 2024; Bussmann et al. 2024, 2025)."""
        return 1 / 32 if self.sparse_by == "k" else 0.0


def nothing_to_penalise() -> Float[Array, ""]:
    """The penalty of an architecture whose k makes it sparse."""
    return jnp.float32(0.0)


def step_gradient(pre: Array, threshold: Array, bandwidth: Array | float) -> Array:
    """1 / bandwidth within half a bandwidth of the threshold, else 0: the rectangle kernel that stands for the derivative of a step."""
    return jnp.where(jnp.abs(pre - threshold) < bandwidth / 2, 1.0 / bandwidth, 0.0)

