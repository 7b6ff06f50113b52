"""A sparse autoencoder as pure functions on one small pytree.

    x -> normalise -> (x - b_dec) W_enc + b_enc -> activation -> z -> z W_dec + b_dec -> undo the normalisation

A transcoder (cfg.d_out) is the same with another tap's activations as what is reconstructed, and perhaps x W_skip added.

Letters: B rows, D d_in, E width of what is reconstructed, F d_sae, K kept latents.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sae.architectures import ARCHITECTURES
from sae.base import SKIP_AXES, Architecture, Params, centred, decoded, decoder_norms, product_dtype, with_skip
from sae.config import ROW_WISE, SAEConfig
from sae.errors import SAEError
from sae.select import top_k

LAYER_NORM_EPS = 1e-5  # SAELens's constant, added to the standard deviation


@flax.struct.dataclass
class Dictionary:
    """Parameters of an SAE (`W_enc` [D, F], `b_enc` [F], `W_dec` [F, E], `b_dec` [E], and what its architecture and a skip add) and its static
    description."""

    params: Params
    cfg: SAEConfig = flax.struct.field(pytree_node=False)


def architecture(cfg: SAEConfig) -> Architecture:
    """The row of the architecture table that `cfg` names."""
    return ARCHITECTURES[cfg.architecture]


def param_axes(cfg: SAEConfig) -> dict[str, tuple[str, ...]]:
    """Name -> logical axes of every parameter."""
    return architecture(cfg).axes | (SKIP_AXES if cfg.skip else {})


def param_shapes(cfg: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter, derived from its logical axes, which are fields of the config."""
    return {name: tuple(getattr(cfg, a) for a in axes) for name, axes in param_axes(cfg).items()}


def init(cfg: SAEConfig, key: Array) -> Dictionary:
    """Random decoder rows of norm 1, the encoder their transpose, the rest zero (Gao et al. 2024, appendix A.1).

    A transcoder's encoder has random columns of norm 1 of its own, since its decoder writes to another space."""
    keys = (key, jax.random.fold_in(key, 1))
    rows = [jax.random.normal(k, (cfg.d_sae, width), jnp.float32) for k, width in zip(keys, (cfg.out, cfg.d_in), strict=True)]
    writes, reads = (r / jnp.linalg.norm(r, axis=1, keepdims=True) for r in rows)
    reads = writes if cfg.d_out is None else reads
    params = {name: jnp.zeros(shape, cfg.dtype) for name, shape in param_shapes(cfg).items()}
    params |= {"W_dec": writes.astype(cfg.dtype), "W_enc": reads.T.astype(cfg.dtype)}
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
    if cfg.normalize_activations in ("layer_norm", "layer_norm_eps"):
        shift = x.mean(axis=-1, keepdims=True)
        scale = jnp.std(x, axis=-1, ddof=1, keepdims=True)
        return (x - shift) / (scale + LAYER_NORM_EPS), (shift, scale if cfg.normalize_activations == "layer_norm" else scale + LAYER_NORM_EPS)
    return x, (0.0, 1.0)


def encoder_input(params: Params, cfg: SAEConfig, x: Array) -> Array:
    """The normalised, centred rows that W_enc multiplies, fp32."""
    return centred(params, normalise(cfg, x)[0], bool(cfg.apply_b_dec_to_input))


def check_width(name: str, array: Array, width: int) -> None:
    """Raises SAEError when the last axis of `array` is not `width`."""
    if not jnp.ndim(array) or jnp.shape(array)[-1] != width:
        raise SAEError(f"{name} has shape {tuple(jnp.shape(array))}; this SAE needs a last axis of {width}")


@jax.jit
def encode(d: Dictionary, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
    """Latent activations of every row, fp32. Raises SAEError when x's width is not d_in."""
    check_width("x", x, d.cfg.d_in)
    return architecture(d.cfg).encode(d.params, encoder_input(d.params, d.cfg, x), d.cfg)


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
    if arch.encode_sparse is not None and k <= (d.cfg.k or 0):
        return arch.encode_sparse(d.params, rows, k)
    return top_k(arch.encode(d.params, rows, d.cfg), k)


def denormalise(cfg: SAEConfig, x_hat: Array, x: Array | None) -> Array:
    """Takes a reconstruction back to the scale of what is reconstructed; row-wise normalisations need the input `x` itself."""
    if not cfg.undo_normalization:
        return x_hat
    if cfg.normalize_activations in ROW_WISE:
        if x is None:
            raise SAEError(f"decode: an SAE with {cfg.normalize_activations} needs the input too: decode(d, z, x)")
        shift, scale = normalise(cfg, x)[1]
        return x_hat * scale + shift
    scale = cfg.input_scale if cfg.d_out is None else cfg.output_scale
    return x_hat / scale if cfg.normalize_activations == "expected_average_only_in" else x_hat


def skip_input(d: Dictionary, x: Array | None) -> Array | None:
    """The normalised rows that a skip multiplies; None where there is no skip."""
    if not d.cfg.skip:
        return None
    if x is None:
        raise SAEError("decode: a skip transcoder needs its input too: decode(d, z, x)")
    return normalise(d.cfg, x)[0]


@jax.jit
def decode(d: Dictionary, z: Float[Array, "... F"], x: Float[Array, "... D"] | None = None) -> Float[Array, "... E"]:
    """z W_dec + b_dec in fp32, on the scale of what is reconstructed. `x`, the encoded rows, is needed by row-wise normalisations and by a
    skip only."""
    check_width("z", z, d.cfg.d_sae)
    return denormalise(d.cfg, decoded(d.params, z, skip_input(d, x)), x)


@jax.jit
def decode_topk(
    d: Dictionary, values: Float[Array, "... K"], indices: Int[Array, "... K"], x: Float[Array, "... D"] | None = None
) -> Float[Array, "... E"]:
    """`decode` of the sparse code (values, indices): a weighted sum of K decoder rows, fp32."""
    rows = d.params["W_dec"][indices]
    rows = rows.astype(product_dtype(rows))
    x_hat = jnp.einsum("...k,...kd->...d", values.astype(rows.dtype), rows, preferred_element_type=jnp.float32)
    x_hat = with_skip(d.params, x_hat + d.params["b_dec"].astype(jnp.float32), skip_input(d, x))
    return denormalise(d.cfg, x_hat, x)


@jax.jit
def reconstruct(d: Dictionary, x: Float[Array, "... D"]) -> Float[Array, "... E"]:
    """decode(encode(x)) in x's dtype: what is spliced into a model in place of x, or of a transcoder's output."""
    if architecture(d.cfg).encode_sparse is not None:
        return decode_topk(d, *encode_topk(d, x), x).astype(x.dtype)
    return decode(d, encode(d, x), x).astype(x.dtype)


def fold_input_scale(d: Dictionary) -> Dictionary:
    """The same function of raw activations with "expected_average_only_in" absorbed into the weights.

    With s = input_scale: W_enc s, W_dec / s, b_dec / s (a transcoder: over its output_scale). Latents are unchanged, and so are thresholds
    (SAELens's saved form).
    """
    if d.cfg.normalize_activations != "expected_average_only_in":
        return d
    out = d.cfg.input_scale if d.cfg.d_out is None else d.cfg.output_scale
    params = scale_params(d.params, d.cfg.input_scale, out)
    return Dictionary(params, d.cfg.replace(normalize_activations="none", input_scale=1.0, output_scale=1.0))


def unfold_input_scale(d: Dictionary, input_scale: float) -> Dictionary:
    """The inverse of `fold_input_scale`: weights for inputs multiplied by `input_scale`, same latents."""
    if d.cfg.normalize_activations != "none":
        raise SAEError(f"unfold_input_scale: the SAE already normalises its input ({d.cfg.normalize_activations})")
    cfg = d.cfg.replace(normalize_activations="expected_average_only_in", input_scale=float(input_scale))
    out = 1.0 if d.cfg.d_out is None else input_scale  # a transcoder's output keeps its scale
    return Dictionary(scale_params(d.params, 1.0 / input_scale, out / input_scale), cfg)


def scale_params(params: Params, scale: float, out: float) -> Params:
    """The encoder times `scale`, the decoder and its bias over `out`, a skip times the one and over the other."""
    scaled = {"W_enc": params["W_enc"] * scale, "W_dec": params["W_dec"] / out, "b_dec": params["b_dec"] / out}
    if "W_skip" in params:
        scaled["W_skip"] = params["W_skip"] * (scale / out)
    return params | scaled


def fold_decoder_norm(d: Dictionary) -> Dictionary:
    """Unit decoder rows, their norms moved to the encoder, its biases and thresholds; x_hat is unchanged where latents do not compete.

    For "topk" the choice of latents is then by contribution (activation times row norm), which is what SAELens's
    `rescale_acts_by_decoder_norm` means: use it on load of such an SAE. Rows of norm 0 stay as they are.
    """
    scales = norm_scales(d.cfg, jax.jit(decoder_norms)(d.params))
    return dataclasses.replace(d, params=d.params | {name: _scaled(d.params[name], by) for name, by in scales.items()})


def norm_scales(cfg: SAEConfig, norms_F: Float[Any, "F"]) -> dict[str, Any]:
    """Name -> what `fold_decoder_norm` multiplies a parameter by (broadcast over it), of the norms of the decoder's rows."""
    norms_F = norms_F + (norms_F == 0)
    return {"W_dec": 1 / norms_F[:, None], "W_enc": norms_F} | dict.fromkeys(architecture(cfg).norm_scaled, norms_F)


@jax.jit
def _scaled(a: Array, by: Array) -> Array:
    """a * by rounded once, to a's dtype, without a copy of `a` in fp32."""
    return (a.astype(jnp.float32) * by).astype(a.dtype)


@jax.jit
def all_finite(a: Array) -> Array:
    """Whether no entry is NaN or infinite."""
    return jnp.isfinite(a).all()


def cast(d: Dictionary, dtype: str) -> Dictionary:
    """The dictionary with parameters of `dtype`. Raises SAEError for one that is not finite in it (fp16 ends at 65,504)."""
    out = Dictionary(jax.tree.map(lambda a: a.astype(dtype), d.params), d.cfg.replace(dtype=dtype))
    check_params(out.params, dtype, "sae.cast")
    return out


def check_params(params: Params, dtype: str, where: Any) -> None:
    """Raises SAEError naming `where` and the first parameter that holds a NaN or an infinity."""
    for name in sorted(params):
        if not all_finite(params[name]):
            hint = "; it may be too large for float16: give dtype='float32' or 'bfloat16'" if dtype == "float16" else ""
            raise SAEError(f"{where}: {name} holds a NaN or an infinity{hint}")


def reads_and_writes(cfg: SAEConfig, rows: Any) -> tuple[Any, Any]:
    """(what is encoded, what is to be reconstructed) of raw rows: [x] twice, or the parts of [x | y] of a transcoder. Raises SAEError for
    rows of another width."""
    check_width("activations", rows, cfg.d_in + (cfg.d_out or 0))
    return (rows, rows) if cfg.d_out is None else (rows[..., : cfg.d_in], rows[..., cfg.d_in :])


def training_pair(cfg: SAEConfig, rows: Float[Array, "B W"]) -> tuple[Float[Array, "B D"], Float[Array, "B E"]]:
    """(encoder's input before centring, what is to be reconstructed) in fp32, from raw activations: [x], or [x | y] for a transcoder."""
    x = normalise(cfg, rows[:, : cfg.d_in])[0]
    if cfg.d_out is None:
        return x, x if cfg.undo_normalization else rows.astype(jnp.float32)
    y = rows[:, cfg.d_in :].astype(jnp.float32)
    return x, y * cfg.output_scale if cfg.normalize_activations == "expected_average_only_in" else y
