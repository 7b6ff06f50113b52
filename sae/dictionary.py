"""A sparse autoencoder as pure functions on one small pytree.

    x -> normalise -> (x - b_dec) W_enc + b_enc -> activation -> z -> z W_dec + b_dec -> undo the normalisation

Letters: B rows, D d_in, F d_sae, K kept latents.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sae.architectures import ARCHITECTURES, Architecture, Params, matmul
from sae.config import SAEConfig
from sae.errors import SAEError
from sae.select import top_k

LAYER_NORM_EPS = 1e-5  # SAELens's constant, added to the standard deviation


@flax.struct.dataclass
class Dictionary:
    """Parameters of an SAE (`W_enc` [D, F], `b_enc` [F], `W_dec` [F, D], `b_dec` [D]) and its static description."""

    params: Params
    cfg: SAEConfig = flax.struct.field(pytree_node=False)


def architecture(cfg: SAEConfig) -> Architecture:
    """The row of the architecture table that `cfg` names."""
    return ARCHITECTURES[cfg.architecture]


def param_shapes(cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, derived from the architecture's logical axes."""
    return {name: tuple(getattr(cfg, a) for a in axes) for name, axes in architecture(cfg).axes.items()}


def init(cfg: SAEConfig, key: Array) -> Dictionary:
    """Random decoder rows of norm 1, the encoder their transpose, zero biases (Gao et al. 2024, appendix A.1)."""
    rows = jax.random.normal(key, (cfg.d_sae, cfg.d_in), jnp.float32)
    rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    params = {name: jnp.zeros(shape, cfg.dtype) for name, shape in param_shapes(cfg).items()}
    params |= {"W_dec": rows.astype(cfg.dtype), "W_enc": rows.T.astype(cfg.dtype)}
    return Dictionary(params=params, cfg=cfg)


def normalise(cfg: SAEConfig, x: Float[Array, "... D"]) -> tuple[Array, tuple[Any, Any]]:
    """Applies cfg.normalize_activations in fp32: (normalised x, (shift, scale)) with x = normalised * scale + shift."""
    x = x.astype(jnp.float32)
    if cfg.normalize_activations == "expected_average_only_in":
        return x * cfg.input_scale, (0.0, 1.0 / cfg.input_scale)
    if cfg.normalize_activations == "constant_norm_rescale":
        scale = jnp.linalg.norm(x, axis=-1, keepdims=True) / cfg.d_in**0.5
        scale = jnp.where(scale > 0, scale, 1.0)
        return x / scale, (0.0, scale)
    if cfg.normalize_activations == "layer_norm":
        shift = x.mean(axis=-1, keepdims=True)
        scale = jnp.std(x, axis=-1, ddof=1, keepdims=True)
        return (x - shift) / (scale + LAYER_NORM_EPS), (shift, scale)
    return x, (0.0, 1.0)


def encoder_input(params: Params, cfg: SAEConfig, x: Array) -> Array:
    """The normalised, centred rows that W_enc multiplies, in the parameters' dtype."""
    x = normalise(cfg, x)[0]
    if cfg.apply_b_dec_to_input:
        x = x - params["b_dec"].astype(jnp.float32)
    return x.astype(params["W_enc"].dtype)


def check_width(name: str, array: Array, width: int) -> None:
    """Raises SAEError when the last axis of `array` is not `width`."""
    if not jnp.ndim(array) or jnp.shape(array)[-1] != width:
        raise SAEError(f"{name} has shape {tuple(jnp.shape(array))}; this SAE needs a last axis of {width}")


@jax.jit
def encode(d: Dictionary, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    """Latent activations of every row, fp32. Raises SAEError when x's width is not d_in."""
    check_width("x", x, d.cfg.d_in)
    return architecture(d.cfg).encode(d.params, encoder_input(d.params, d.cfg, x), d.cfg.k)


@functools.partial(jax.jit, static_argnames="k")
def encode_topk(
    d: Dictionary, x: Float[Array, "... D"], k: int | None = None
) -> tuple[Float[Array, "... K"], Int[Array, "... K"]]:
    """The k largest latents of every row, largest first: (values, int32 indices); unused slots hold value 0.

    k defaults to the dictionary's own. A dense architecture (no k of its own) needs it given: what lies below the k
    largest is then dropped.
    """
    check_width("x", x, d.cfg.d_in)
    k = k or d.cfg.k
    if not k or k > d.cfg.d_sae:
        raise SAEError(f"encode_topk: k is {k}; give 1 <= k <= d_sae = {d.cfg.d_sae}")
    arch, rows = architecture(d.cfg), encoder_input(d.params, d.cfg, x)
    if arch.encode_sparse is not None and k <= d.cfg.k:
        return arch.encode_sparse(d.params, rows, k)
    return top_k(arch.encode(d.params, rows, d.cfg.k), k)


def denormalise(cfg: SAEConfig, x_hat: Array, x: Array | None) -> Array:
    """Takes a reconstruction back to the input's scale; row-wise normalisations need the input `x` itself."""
    if cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
        if x is None:
            raise SAEError(f"decode: an SAE with {cfg.normalize_activations} needs the input too: decode(d, z, x)")
        shift, scale = normalise(cfg, x)[1]
        return x_hat * scale + shift
    return x_hat / cfg.input_scale if cfg.normalize_activations == "expected_average_only_in" else x_hat


@jax.jit
def decode(d: Dictionary, z: Float[Array, "... F"], x: Float[Array, "... D"] | None = None) -> Float[Array, "... D"]:
    """z W_dec + b_dec in fp32, on the input's scale. `x`, the encoded rows, is needed by row-wise normalisations only."""
    check_width("z", z, d.cfg.d_sae)
    x_hat = matmul(z.astype(d.params["W_dec"].dtype), d.params["W_dec"]) + d.params["b_dec"].astype(jnp.float32)
    return denormalise(d.cfg, x_hat, x)


@jax.jit
def decode_topk(
    d: Dictionary, values: Float[Array, "... K"], indices: Int[Array, "... K"], x: Float[Array, "... D"] | None = None
) -> Float[Array, "... D"]:
    """`decode` of the sparse code (values, indices): a weighted sum of K decoder rows, fp32."""
    rows = d.params["W_dec"][indices]
    x_hat = jnp.einsum("...k,...kd->...d", values.astype(rows.dtype), rows, preferred_element_type=jnp.float32)
    return denormalise(d.cfg, x_hat + d.params["b_dec"].astype(jnp.float32), x)


@jax.jit
def reconstruct(d: Dictionary, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """decode(encode(x)) in x's dtype: what is spliced into a model in place of x."""
    if architecture(d.cfg).encode_sparse is not None:
        return decode_topk(d, *encode_topk(d, x), x).astype(x.dtype)
    return decode(d, encode(d, x), x).astype(x.dtype)


def fold_input_scale(d: Dictionary) -> Dictionary:
    """The same function of raw activations with "expected_average_only_in" absorbed into the weights.

    With s = input_scale: W_enc s, W_dec / s, b_dec / s. Latents are unchanged (SAELens's saved form).
    """
    if d.cfg.normalize_activations != "expected_average_only_in":
        return d
    return Dictionary(scale_params(d.params, d.cfg.input_scale), d.cfg.replace(normalize_activations="none", input_scale=1.0))


def unfold_input_scale(d: Dictionary, input_scale: float) -> Dictionary:
    """The inverse of `fold_input_scale`: weights for inputs multiplied by `input_scale`, same latents."""
    if d.cfg.normalize_activations != "none":
        raise SAEError(f"unfold_input_scale: the SAE already normalises its input ({d.cfg.normalize_activations})")
    cfg = d.cfg.replace(normalize_activations="expected_average_only_in", input_scale=float(input_scale))
    return Dictionary(scale_params(d.params, 1.0 / input_scale), cfg)


def scale_params(params: Params, scale: float) -> Params:
    """Encoder times, decoder and its bias over, `scale`."""
    scaled = {"W_enc": params["W_enc"] * scale, "W_dec": params["W_dec"] / scale, "b_dec": params["b_dec"] / scale}
    return params | scaled


def fold_decoder_norm(d: Dictionary) -> Dictionary:
    """Unit decoder rows, their norms moved to the encoder and its bias; x_hat is unchanged for a ReLU dictionary.

    For "topk" the choice of latents is then by contribution (activation times row norm), which is what SAELens's
    `rescale_acts_by_decoder_norm` means: use it on load of such an SAE. Rows of norm 0 stay as they are.
    """
    norms = jnp.linalg.norm(d.params["W_dec"].astype(jnp.float32), axis=1)
    norms = jnp.where(norms > 0, norms, 1.0).astype(d.params["W_dec"].dtype)
    folded = {
        "W_dec": d.params["W_dec"] / norms[:, None],
        "W_enc": d.params["W_enc"] * norms,
        "b_enc": d.params["b_enc"] * norms,
    }
    return dataclasses.replace(d, params=d.params | folded)
