"""What a decoder-only language model is: one frozen description, shared by every family."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from models.errors import ModelError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary-embedding scaling, named as in Hugging Face configs (`rope_type` and its parameters).

    kind: "default", "linear", "dynamic", "llama3" or "yarn". Unused fields keep their defaults.
    """

    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Hashable, so it is a static argument of every jitted function.

    Lengths are in tokens, widths in units. `layer_windows` gives each layer's sliding window
    (None = full attention); an empty tuple means full attention everywhere. `dtype` is the dtype of
    parameters and activations; norms, softmax, logits and log-probabilities are fp32 in any case.
    """

    family: str = "llama"
    vocab_size: int = 32000
    d_model: int = 512
    n_layers: int = 6
    n_heads: int = 8
    n_kv_heads: int = 8
    head_dim: int = 64
    d_ff: int = 1376
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_position: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_windows: tuple[int | None, ...] = ()
    activation: str = "silu"
    dtype: str = "float32"
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self):
        if self.n_heads % self.n_kv_heads:
            raise ModelError(f"n_heads={self.n_heads} must be a multiple of n_kv_heads={self.n_kv_heads}")
        if self.layer_windows and len(self.layer_windows) != self.n_layers:
            raise ModelError(f"layer_windows names {len(self.layer_windows)} layers, the model has {self.n_layers}")

    def window(self, layer: int) -> int | None:
        """The sliding window of `layer` in tokens, or None for full attention."""
        return self.layer_windows[layer] if self.layer_windows else None

    def param_count(self) -> int:
        """Number of parameters, by formula (equals the size of the parameter tree)."""
        d, n, k, h, f = self.d_model, self.n_heads, self.n_kv_heads, self.head_dim, self.d_ff
        attn = d * h * (2 * n + 2 * k) + (h * (n + 2 * k) if self.qkv_bias else 0) + (d if self.o_bias else 0)
        attn += 2 * h if self.qk_norm else 0
        mlp = 3 * d * f + (2 * f + d if self.mlp_bias else 0)
        head = 0 if self.tie_embeddings else d * self.vocab_size
        return self.vocab_size * d + self.n_layers * (attn + mlp + 2 * d) + d + head

    def flops_per_token(self, context: int = 0) -> int:
        """Forward FLOPs a token (multiply and add are two) at a mean attended context of `context` tokens.

        Backward is twice that. The embedding look-up costs nothing; the unembedding counts whether tied or not.
        """
        d, n, k, h, f = self.d_model, self.n_heads, self.n_kv_heads, self.head_dim, self.d_ff
        layer = 2 * d * h * (2 * n + 2 * k) + 6 * d * f
        attention = sum(4 * n * h * min(context, self.window(i) or context) for i in range(self.n_layers))
        return self.n_layers * layer + attention + 2 * d * self.vocab_size

    @classmethod
    def from_hf(cls, config: dict) -> ModelConfig:
        """From the contents of a Hugging Face `config.json`. Raises ModelError for an unknown architecture."""
        from models.hf_config import config_from_hf

        return config_from_hf(config)

    def to_hf(self) -> dict:
        """The contents of a Hugging Face `config.json` that `transformers` reads back as the same model."""
        from models.hf_config import config_to_hf

        return config_to_hf(self)


def rope_frequencies(cfg: ModelConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies [head_dim / 2] in radians a token (fp32), and the factor on cos and sin (YaRN's; else 1).

    Formulas: RoPE (Su et al. 2021), position interpolation (linear; Chen et al. 2023), Llama 3.1's band-wise scaling,
    YaRN (Peng et al. 2023, eq. 17-23). "dynamic" depends on the length: these are its frequencies up to max_position,
    `rope_stretch` changes them past it. Each step rounds to fp32 as in `transformers`, because one unit in the last
    place of a frequency is milliradians at position 100,000.
    """
    s, f32 = cfg.rope_scaling, np.float32
    exponents = (np.arange(0, cfg.head_dim, 2, dtype=f32) / f32(cfg.head_dim)).astype(np.float64)
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
    s, h = cfg.rope_scaling, cfg.head_dim
    return (s.factor * (length / cfg.max_position) - (s.factor - 1)) ** (h / (h - 2))


def _llama3_frequencies(base: np.ndarray, s: RopeScaling) -> np.ndarray:
    """Long waves are slowed by `factor`, short ones kept, those between blended linearly in turns a context."""
    turns = np.float32(s.original_max_position) / (np.float32(2 * math.pi) / base)
    blend = (turns - np.float32(s.low_freq_factor)) / np.float32(s.high_freq_factor - s.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return (1 - blend) * base / np.float32(s.factor) + blend * base


def _yarn_frequencies(cfg: ModelConfig, wavelengths: np.ndarray) -> tuple[np.ndarray, float]:
    s, half = cfg.rope_scaling, cfg.head_dim // 2

    def dim_of(rotations: float) -> float:
        # The dimension whose wave turns `rotations` times over the original context.
        turns = math.log(s.original_max_position / (rotations * 2 * math.pi))
        return cfg.head_dim * turns / (2 * math.log(cfg.rope_theta))

    def mscale(scale: float, m: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    low, high = dim_of(s.beta_fast), dim_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, cfg.head_dim - 1)
    high = high + 0.001 if low == high else high
    keep = 1 - np.clip((np.arange(half, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    slowed = 1 / (np.float32(s.factor) * wavelengths)
    freqs = slowed * (1 - keep) + 1 / wavelengths * keep
    if s.attention_factor is not None:
        return freqs, s.attention_factor
    if s.mscale and s.mscale_all_dim:
        return freqs, mscale(s.factor, s.mscale) / mscale(s.factor, s.mscale_all_dim)
    return freqs, mscale(s.factor)
