"""Rotary position embeddings (Su et al. 2021): frequencies and their scalings, tables of cosines and sines, rotation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from models.config import ModelConfig, RopeScaling
from models.errors import ModelError


def rotary_dim(cfg: ModelConfig) -> int:
    """How many units of a head are rotated."""
    return cfg.head_dim if cfg.rotary_dim is None else cfg.rotary_dim


def rope_frequencies(cfg: ModelConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies [rotary_dim / 2] in radians a token (fp32), and the factor on cos and sin (YaRN's; else 1).

    Formulas: RoPE (Su et al. 2021), position interpolation (linear; Chen et al. 2023), Llama 3.1's band-wise scaling,
    YaRN (Peng et al. 2023, eq. 17-23). "dynamic" depends on the length: these are its frequencies up to max_position,
    `rope_stretch` changes them past it. Each step rounds to fp32 as in `transformers`, because one unit in the last
    place of a frequency is milliradians at position 100,000.
    """
    s, f32, dim = cfg.rope_scaling, np.float32, rotary_dim(cfg)
    exponents = (np.arange(0, dim, 2, dtype=f32) / f32(dim)).astype(np.float64)
    wavelengths = np.power(float(cfg.rope_theta), exponents).astype(f32)  # over 2 pi
    base = f32(1) / wavelengths
    if s.kind in ("default", "dynamic"):
        return base, 1.0
    if s.kind == "linear":
        return base / f32(s.factor), 1.0
    if s.kind == "llama3":
        return _llama3_frequencies(base, s), 1.0
    if s.kind == "yarn":
        return _yarn_frequencies(cfg, wavelengths)
    raise ModelError(f"unknown rope scaling {s.kind!r}; known: default, linear, dynamic, llama3, yarn")


def rope_stretch(cfg: ModelConfig, length):
    """Factor on rope_theta for rows of `length` >= max_position tokens under "dynamic" NTK scaling."""
    s, h = cfg.rope_scaling, rotary_dim(cfg)
    return (s.factor * (length / cfg.max_position) - (s.factor - 1)) ** (h / (h - 2))


def _llama3_frequencies(base: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones kept, those between blended linearly in turns a context."""
    turns = np.float32(s.original_max_position) / (np.float32(2 * math.pi) / base)
    blend = (turns - np.float32(s.low_freq_factor)) / np.float32(s.high_freq_factor - s.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return (1 - blend) * base / np.float32(s.factor) + blend * base


def _yarn_frequencies(cfg: ModelConfig, wavelengths: np.ndarray) -> tuple[np.ndarray, float]:
    s, dim = cfg.rope_scaling, rotary_dim(cfg)

    def dim_of(rotations: float) -> float:
        # The dimension whose wave turns `rotations` times over the original context.
        turns = math.log(s.original_max_position / (rotations * 2 * math.pi))
        return dim * turns / (2 * math.log(cfg.rope_theta))

    def mscale(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    low, high = dim_of(s.beta_fast), dim_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    keep = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    slowed = 1 / (np.float32(s.factor) * wavelengths)
    freqs = slowed * (1 - keep) + 1 / wavelengths * keep
    if s.attention_factor is not None:
        return freqs, s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return freqs, mscale(s.factor, s.mscale) / mscale(s.factor, s.mscale_all_dim)
    return freqs, mscale(s.factor)


def rope_table(cfg: ModelConfig, positions_BT: Int[Array, "B T"]) -> tuple[Array, Array]:
    """cos and sin [B, T, 1, rotary_dim / 2] in fp32 at integer positions; padding (-1) is treated as position 0.

    "dynamic" scaling stretches the base by each row's own length (last position + 1) once it passes max_position;
    cached keys stay as they were written, so a row that crosses max_position while it is sampled differs a little
    from the same row in one pass.
    """
    freqs, factor = rope_frequencies(cfg)
    freqs = jnp.asarray(freqs)
    if cfg.rope_scaling.kind == "dynamic":
        length = jnp.maximum(jnp.max(positions_BT, axis=1) + 1, cfg.max_position)[:, None, None]
        freqs = freqs * rope_stretch(cfg, length) ** -(jnp.arange(freqs.size) * 2 / rotary_dim(cfg))
    angles = jnp.maximum(positions_BT, 0)[..., None].astype(jnp.float32) * freqs
    # The barrier keeps XLA from computing cosines again in every layer that uses them.
    return lax.optimization_barrier((factor * jnp.cos(angles)[:, :, None], factor * jnp.sin(angles)[:, :, None]))


def layer_ropes(cfg: ModelConfig, positions_BT: Int[Array, "B T"]) -> Callable[[Any], Any]:
    """layer -> its `rope_table`, or None where positions are not rotary. Computed once a distinct base, then picked by layer."""
    if cfg.positions != "rotary":
        return lambda layer: None
    plain = rope_table(cfg, positions_BT)
    if cfg.local_rope_theta is None:
        return lambda layer: plain
    local = rope_table(dataclasses.replace(cfg, rope_theta=cfg.local_rope_theta, rope_scaling=RopeScaling()), positions_BT)
    stacked = tuple(jnp.stack(pair) for pair in zip(plain, local, strict=True))
    which = jnp.asarray([int(cfg.window(i) is not None) for i in range(cfg.n_layers)])
    return lambda layer: tuple(table[which[layer]] for table in stacked)


def rotate(x_BTNH: Array, cos: Array, sin: Array, pairs: str = "half") -> Array:
    """Rotary position embedding of the first 2 R units of a head, where cos and sin are [B, T, 1, R].

    pairs: "half" pairs unit i with i + R; "adjacent" pairs 2 i with 2 i + 1 (GPT-J).
    """
    size = 2 * cos.shape[-1]
    x, rest = (x_BTNH, None) if size == x_BTNH.shape[-1] else (x_BTNH[..., :size], x_BTNH[..., size:])
    x = x.astype(jnp.float32)
    if pairs == "half":
        a, b = jnp.split(x, 2, axis=-1)
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    out = out.astype(x_BTNH.dtype)
    return out if rest is None else jnp.concatenate([out, rest], axis=-1)
