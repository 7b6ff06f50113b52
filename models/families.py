"""The model families as a table of differences, and both directions between `config.json` and `ModelConfig`.

To add a family whose block is the same pre-norm decoder: add a row to FAMILIES (and its parity case to
tests/models/parity_cases.py). A new kind of block belongs in `models/transformer.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.config import ModelConfig, RopeScaling
from models.errors import ModelError


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one parameter lives in a checkpoint.

    name: "{layer}" stands for the layer's number; such a leaf is stacked on a leading axis that is not counted below.
    ours: a letter for each axis of our leaf. stored: the axes of the tensor, each a run of our letters flattened
      together; torch's matrices are [out, in], ours [in..., out...], so "DNH" is stored as "NH D".
    """

    name: str
    ours: str
    stored: str

    def names(self, n_layers: int) -> list[str]:
        """The tensor's name, or its name in each layer."""
        return [self.name.format(layer=i) for i in range(n_layers)] if "{layer}" in self.name else [self.name]

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in the file of our (unstacked) leaf of `shape`."""
        sizes = dict(zip(self.ours, shape, strict=True))
        return tuple(math.prod(sizes[a] for a in group) for group in self.stored.split())

    def to_stored(self, value: np.ndarray) -> np.ndarray:
        """Our (unstacked) leaf, laid out as in the file."""
        order = [self.ours.index(a) for a in self.stored.replace(" ", "")]
        return value.transpose(order).reshape(self.stored_shape(value.shape))

    def read(self, read: Callable[[tuple[slice, ...]], np.ndarray], shape: Sequence[int], index: Sequence[slice]):
        """The part of our (unstacked) leaf of `shape` within `index`, through `read(slices of the stored tensor)`.

        Reads no more than it must as long as only the first letter of each run is cut (which is how we shard).
        """
        sizes = dict(zip(self.ours, shape, strict=True))
        cut = dict(zip(self.ours, index, strict=True))
        wanted = []
        for first, *rest in self.stored.split():
            start, stop, _ = cut[first].indices(sizes[first])
            row = math.prod(sizes[a] for a in rest)
            wanted.append(slice(start * row, stop * row))
            sizes[first], cut[first] = stop - start, slice(None)
        letters = self.stored.replace(" ", "")
        part = read(tuple(wanted)).reshape([sizes[a] for a in letters])
        return part.transpose([letters.index(a) for a in self.ours])[tuple(cut[a] for a in self.ours)]


# One for each parameter, the same for all families so far; a family lists only those it keeps elsewhere.
_LAYER = "model.layers.{layer}."
TENSORS: dict[str, Tensor] = {
    "embed.embedding": Tensor("model.embed_tokens.weight", "VD", "V D"),
    "blocks.attn_norm": Tensor(_LAYER + "input_layernorm.weight", "D", "D"),
    "blocks.q": Tensor(_LAYER + "self_attn.q_proj.weight", "DNH", "NH D"),
    "blocks.k": Tensor(_LAYER + "self_attn.k_proj.weight", "DKH", "KH D"),
    "blocks.v": Tensor(_LAYER + "self_attn.v_proj.weight", "DKH", "KH D"),
    "blocks.o": Tensor(_LAYER + "self_attn.o_proj.weight", "NHD", "D NH"),
    "blocks.q_bias": Tensor(_LAYER + "self_attn.q_proj.bias", "NH", "NH"),
    "blocks.k_bias": Tensor(_LAYER + "self_attn.k_proj.bias", "KH", "KH"),
    "blocks.v_bias": Tensor(_LAYER + "self_attn.v_proj.bias", "KH", "KH"),
    "blocks.o_bias": Tensor(_LAYER + "self_attn.o_proj.bias", "D", "D"),
    "blocks.q_norm": Tensor(_LAYER + "self_attn.q_norm.weight", "H", "H"),
    "blocks.k_norm": Tensor(_LAYER + "self_attn.k_norm.weight", "H", "H"),
    "blocks.mlp_norm": Tensor(_LAYER + "post_attention_layernorm.weight", "D", "D"),
    "blocks.gate": Tensor(_LAYER + "mlp.gate_proj.weight", "DF", "F D"),
    "blocks.up": Tensor(_LAYER + "mlp.up_proj.weight", "DF", "F D"),
    "blocks.down": Tensor(_LAYER + "mlp.down_proj.weight", "FD", "D F"),
    "blocks.gate_bias": Tensor(_LAYER + "mlp.gate_proj.bias", "F", "F"),
    "blocks.up_bias": Tensor(_LAYER + "mlp.up_proj.bias", "F", "F"),
    "blocks.down_bias": Tensor(_LAYER + "mlp.down_proj.bias", "D", "D"),
    "final_norm.scale": Tensor("model.norm.weight", "D", "D"),
    "lm_head.kernel": Tensor("lm_head.weight", "DV", "V D"),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one family apart. A bias is True, False or the name of the config field that decides.

    windows: "none"; "all" or "listed" (`sliding_window` on every layer, or on those of `layer_types`, which "listed"
      always writes); "by_layer" (if `use_sliding_window`: on those of `layer_types`, or from `max_window_layers` on).
    defaults: what `transformers` assumes where config.json is silent. tensors: what is stored elsewhere than TENSORS.
    """

    model_type: str
    architecture: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: str = "none"
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)


_QWEN_DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_LLAMA_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048}
_MISTRAL_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_ROWS = (
    Family(
        "llama",
        "LlamaForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults=_LLAMA_DEFAULTS,
    ),
    Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True, windows="by_layer", defaults=_QWEN_DEFAULTS),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        windows="by_layer",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    Family("mistral", "MistralForCausalLM", windows="all", defaults=_MISTRAL_DEFAULTS),
    Family("ministral", "MinistralForCausalLM", windows="listed", defaults=_MISTRAL_DEFAULTS),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}

ACTIVATION_NAMES = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
DTYPES = ("float32", "bfloat16", "float16")


def tensor_of(cfg: ModelConfig, leaf: str) -> Tensor:
    """The checkpoint tensor of the parameter `leaf`, named like "blocks.q"."""
    return FAMILIES[cfg.family].tensors.get(leaf) or TENSORS[leaf]


# --- config.json -> ModelConfig --------------------------------------------------------------------------------------


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads a `config.json` of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Raises ModelError naming the field for an unknown architecture and for any option that would change the result
    but is not implemented.
    """
    family = _family_of(hf)
    fields = _Fields(hf, family)
    n_layers, n_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    d_model = fields.integer("hidden_size")
    if fields.get("head_dim") is None and d_model % n_heads:
        raise ModelError(f"config.json: hidden_size={d_model} is not a multiple of num_attention_heads={n_heads}")
    head_dim = fields.integer("head_dim", d_model // n_heads)
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim={head_dim} is odd; rotary embeddings need an even one")
    fields.only("hidden_act", fields.get("hidden_act", "silu"), ACTIVATION_NAMES)
    if hf.get("quantization_config"):
        raise ModelError("config.json: quantization_config is not supported: give the full-precision checkpoint")
    theta, scaling = _rope_from_hf(fields)
    return ModelConfig(
        family=family.model_type,
        vocab_size=fields.integer("vocab_size"),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=fields.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        d_ff=fields.integer("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=fields.integer("max_position_embeddings"),
        tie_embeddings=bool(fields.get("tie_word_embeddings", False)),
        qkv_bias=fields.switch(family.qkv_bias),
        o_bias=fields.switch(family.o_bias),
        mlp_bias=fields.switch(family.mlp_bias),
        qk_norm=family.qk_norm,
        layer_windows=_windows_from_hf(fields, n_layers),
        activation=fields.get("hidden_act", "silu"),
        dtype=_dtype_from_hf(fields),
        initializer_range=fields.number("initializer_range", 0.02),
        bos_token_id=fields.get("bos_token_id"),
        eos_token_ids=token_ids(fields.get("eos_token_id")),
        pad_token_id=fields.get("pad_token_id"),
    )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A Hugging Face `eos_token_id` (none, one or several) as a tuple."""
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _family_of(hf: Mapping[str, Any]) -> Family:
    """The family that config.json names: by `architectures`, and by `model_type` where that is absent."""
    by_architecture = {f.architecture: f for f in FAMILIES.values()}
    architectures, model_type = hf.get("architectures") or [], hf.get("model_type")
    for name in architectures:
        if name in by_architecture and model_type in (None, by_architecture[name].model_type):
            return by_architecture[name]
    if not architectures and model_type in FAMILIES:
        return FAMILIES[model_type]
    if not architectures and model_type is None:
        raise ModelError("config.json: neither architectures nor model_type says what the model is")
    if architectures and architectures[0] not in by_architecture:
        field, wanted, table = "architectures", architectures[0], by_architecture
    else:
        field, wanted, table = "model_type", model_type, FAMILIES
    near = difflib.get_close_matches(str(wanted), table, n=1, cutoff=0.0)[0]
    told = f"unknown architecture {wanted!r}; the nearest known is {near!r}; known: {', '.join(table)}"
    raise ModelError(f"config.json: {field}: {told}")


class _Fields:
    """Typed reads of a config.json with the family's defaults, each failure naming its field."""

    def __init__(self, hf: Mapping[str, Any], family: Family):
        self.hf, self.family = hf, family

    def get(self, name: str, default=None):
        """The value of `name`, null included; where absent the family's default, else `default`."""
        return self.hf[name] if name in self.hf else self.family.defaults.get(name, default)

    def integer(self, name: str, derived: int | None = None) -> int:
        """A positive integer; `derived` where it is null or has no default."""
        value = self.get(name, derived)
        value = derived if value is None else value
        if value is None:
            raise ModelError(f"config.json: missing field {name!r}")
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise ModelError(f"config.json: {name} must be a positive integer, not {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ModelError(f"config.json: {name} must be a number, not {value!r}")
        return float(value)

    def switch(self, rule: bool | str) -> bool:
        return bool(self.get(rule, False)) if isinstance(rule, str) else rule

    def only(self, name: str, value, known):
        """`value` if it is one of `known`; otherwise a ModelError naming the field."""
        if value not in known:
            raise ModelError(f"config.json: {name}={value!r} is not supported; known: {', '.join(map(str, known))}")
        return value


_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position"),
    "yarn": (
        "factor",
        "original_max_position",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
_ROPE_REQUIRED = ("factor", "low_freq_factor", "high_freq_factor")


def _rope_from_hf(fields: _Fields) -> tuple[float, RopeScaling]:
    hf = fields.hf
    where = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    given = hf.get(where) or {}
    if any(isinstance(v, Mapping) for v in given.values()):
        raise ModelError(f"config.json: {where}: one rotary embedding for each layer type is not supported")
    theta = float(given.get("rope_theta") or fields.number("rope_theta", 10000.0))
    partial = given.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0
    fields.only(f"{where}.partial_rotary_factor", partial, (1.0,))
    kind = fields.only(f"{where}.rope_type", given.get("rope_type", given.get("type", "default")), tuple(_ROPE_FIELDS))
    original = hf.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    values = {**given, "original_max_position": original or fields.integer("max_position_embeddings")}
    if kind == "yarn" and values.get("factor") is None and original:
        values["factor"] = fields.integer("max_position_embeddings") / original
    for name in _ROPE_REQUIRED:
        if name in _ROPE_FIELDS[kind] and values.get(name) is None:
            raise ModelError(f"config.json: {where}.{name} is missing (rope_type {kind!r} needs it)")
    used = {name: values[name] for name in _ROPE_FIELDS[kind] if values.get(name) is not None}
    return theta, RopeScaling(kind, **used)


def _windows_from_hf(fields: _Fields, n_layers: int) -> tuple[int | None, ...]:
    rule, window = fields.family.windows, fields.get("sliding_window")
    types = fields.hf.get("layer_types")
    if rule == "none" or window is None:
        return ()
    if rule == "by_layer" and not fields.hf.get("use_sliding_window"):
        if "sliding_attention" in (types or ()):
            raise ModelError("config.json: layer_types asks for sliding_attention but use_sliding_window is false")
        return ()
    if types is None:
        first = fields.get("max_window_layers", 0)
        types = ["full_attention" if i < first else "sliding_attention" for i in range(n_layers)]
    if len(types) != n_layers:
        raise ModelError(f"config.json: layer_types names {len(types)} layers, num_hidden_layers is {n_layers}")
    for kind in types:
        fields.only("layer_types", kind, ("full_attention", "sliding_attention"))
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()


def _dtype_from_hf(fields: _Fields) -> str:
    name = str(fields.get("dtype") or fields.get("torch_dtype") or "float32").removeprefix("torch.")
    fields.only("dtype", name, DTYPES)
    # Half precision overflows in training; its values are exact in fp32. Ask for dtype="float16" to keep it.
    return "float32" if name == "float16" else name


# --- ModelConfig -> config.json --------------------------------------------------------------------------------------


def config_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The contents of a `config.json` that transformers 4 and 5 read as this model.

    Raises ModelError naming the fields that the family's config.json has no place for.
    """
    family = FAMILIES.get(cfg.family)
    if family is None:
        raise ModelError(f"unknown family {cfg.family!r}; known: {', '.join(FAMILIES)}")
    eos = cfg.eos_token_ids
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_ff,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": cfg.activation,
        "max_position_embeddings": cfg.max_position,
        "initializer_range": cfg.initializer_range,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "pad_token_id": cfg.pad_token_id,
        "dtype": cfg.dtype,
        "torch_dtype": cfg.dtype,
    }
    for rule, value in ((family.qkv_bias, cfg.qkv_bias), (family.mlp_bias, cfg.mlp_bias)):
        if isinstance(rule, str):
            hf[rule] = value
    hf |= _rope_to_hf(cfg) | _windows_to_hf(cfg, family)
    back = config_from_hf(hf)
    lost = [f.name for f in dataclasses.fields(cfg) if getattr(back, f.name) != getattr(cfg, f.name)]
    if lost and not (lost == ["dtype"] and cfg.dtype == "float16"):
        told = ", ".join(f"{name}={getattr(cfg, name)!r}" for name in lost)
        raise ModelError(f"a {cfg.family} config.json cannot express {told}")
    return hf


def _rope_to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """transformers 5 reads rope_parameters; 4 reads rope_theta and rope_scaling."""
    scaling: dict[str, Any] = {"rope_type": cfg.rope_scaling.kind}
    for name in _ROPE_FIELDS[cfg.rope_scaling.kind]:
        value = getattr(cfg.rope_scaling, name)
        if value is not None:
            scaling["original_max_position_embeddings" if name == "original_max_position" else name] = value
    return {
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None if cfg.rope_scaling.kind == "default" else scaling,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **scaling},
    }


def _windows_to_hf(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    window = next((w for w in cfg.layer_windows if w is not None), None)
    sliding = [cfg.window(i) is not None for i in range(cfg.n_layers)]
    types = {"layer_types": ["sliding_attention" if s else "full_attention" for s in sliding]}
    if family.windows == "none":
        return {}
    if family.windows == "all":
        # transformers takes a Mistral with layer_types for its Ministral class, so they stand only where they must.
        return {"sliding_window": window} | (types if len(set(sliding)) > 1 else {})
    if family.windows == "listed":
        return {"sliding_window": window or cfg.max_position, **types}
    first = sliding.index(True) if any(sliding) else cfg.n_layers
    return {"use_sliding_window": any(sliding), "sliding_window": window, "max_window_layers": first, **types}
