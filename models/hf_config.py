"""Both directions between a Hugging Face `config.json` and `ModelConfig`.

Every field that is read is read through `_Fields`, which knows the family's defaults and says, by name, what is wrong:
JSON that was written by hand or by another program holds strings for numbers, nulls and zeros.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, RopeScaling
from models.errors import ModelError
from models.families import ACTIVATION_NAMES, DTYPES, FAMILIES, Family

# --- config.json -> ModelConfig --------------------------------------------------------------------------------------


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads a `config.json` of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Raises ModelError naming the field for an unknown architecture, for a value of the wrong type or out of range, and for
    any option that would change the result but is not implemented.
    """
    if not isinstance(hf, Mapping):
        raise ModelError(f"config.json: must hold a JSON object, not {_told(hf)}")
    family = _family_of(hf)
    fields = _Fields(hf, family)
    n_layers, n_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    d_model, vocab_size = fields.integer("hidden_size"), fields.integer("vocab_size")
    n_kv_heads = fields.integer("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        told = f"num_attention_heads={n_heads} is not a multiple of num_key_value_heads={n_kv_heads}"
        raise ModelError(f"config.json: {told}")
    if fields.get("head_dim") is None and d_model % n_heads:
        raise ModelError(f"config.json: hidden_size={d_model} is not a multiple of num_attention_heads={n_heads}")
    head_dim = fields.integer("head_dim", d_model // n_heads)
    if head_dim % 2:
        raise ModelError(f"config.json: head_dim={head_dim} is odd; rotary embeddings need an even one")
    if hf.get("quantization_config"):
        raise ModelError("config.json: quantization_config is not supported: give the full-precision checkpoint")
    theta, scaling = _rope_from_hf(fields)
    return ModelConfig(
        family=family.model_type,
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=fields.integer("intermediate_size"),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position=fields.integer("max_position_embeddings"),
        tie_embeddings=fields.switch("tie_word_embeddings"),
        qkv_bias=fields.switch(family.qkv_bias),
        o_bias=fields.switch(family.o_bias),
        mlp_bias=fields.switch(family.mlp_bias),
        qk_norm=family.qk_norm,
        layer_windows=_windows_from_hf(fields, n_layers),
        activation=fields.only("hidden_act", fields.get("hidden_act", "silu"), ACTIVATION_NAMES),
        dtype=_dtype_from_hf(fields),
        initializer_range=fields.number("initializer_range", 0.02, least=0.0),
        bos_token_id=fields.token("bos_token_id", vocab_size),
        eos_token_ids=token_ids(fields.get("eos_token_id"), vocab_size),
        # Old exports say -1 for "no padding token".
        pad_token_id=None if fields.get("pad_token_id") == -1 else fields.token("pad_token_id", vocab_size),
    )


def token_ids(value: Any, vocab_size: int, where: str = "config.json") -> tuple[int, ...]:
    """A Hugging Face `eos_token_id` (none, one or several) as a tuple; ModelError, naming `where`, for anything else."""
    given = value if isinstance(value, list) else [] if value is None else [value]
    for one in given:
        if not _is_whole(one) or not 0 <= one < vocab_size:
            wanted = f"null, a token id (0..{vocab_size - 1}, by vocab_size) or a list of them"
            raise ModelError(f"{where}: eos_token_id must be {wanted}, not {_told(value)}")
    return tuple(given)


def _family_of(hf: Mapping[str, Any]) -> Family:
    """The family that config.json names: by `architectures`, and by `model_type` where that is absent."""
    by_architecture = {f.architecture: f for f in FAMILIES.values()}
    architectures, model_type = hf.get("architectures"), hf.get("model_type")
    if architectures is not None and not _are_strings(architectures):
        raise ModelError(f"config.json: architectures must be a list of names, not {_told(architectures)}")
    if model_type is not None and not isinstance(model_type, str):
        raise ModelError(f"config.json: model_type must be a name, not {_told(model_type)}")
    for name in architectures or ():
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


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # Python counts True as 1, JSON does not


def _are_strings(value) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _told(value) -> str:
    """A wrong value as an error shows it: as Python writes it, but null, true and false as JSON does."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Fields:
    """Typed reads of a config.json with the family's defaults, each failure naming its field.

    inside: the object of the file that is read ("rope_scaling"), which has no defaults; "" for the file itself.
    """

    def __init__(self, hf: Mapping[str, Any], family: Family, inside: str = ""):
        self.hf, self.family = hf, family
        self.prefix = f"{inside}." if inside else ""
        self.defaults = {} if inside else family.defaults

    def wrong(self, name: str, wanted: str, value) -> ModelError:
        return ModelError(f"config.json: {self.prefix}{name} must be {wanted}, not {_told(value)}")

    def get(self, name: str, default=None):
        """The value of `name`, null included; where absent the family's default, else `default`."""
        return self.hf[name] if name in self.hf else self.defaults.get(name, default)

    def integer(self, name: str, derived: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`; `derived` where it is null or has no default."""
        value = self.get(name, derived)
        value = derived if value is None else value
        if value is None and name not in self.hf:
            raise ModelError(f"config.json: missing field '{self.prefix}{name}'")
        if value is None or not _is_whole(value) or value < least:
            raise self.wrong(name, "a positive integer" if least == 1 else f"an integer of at least {least}", value)
        return value

    def number(self, name: str, default: float | None = None, least: float | None = None) -> float:
        """A finite number above zero, or of at least `least`; `default` where it is absent."""
        value = self.get(name, default)
        if value is None and name not in self.hf:
            raise ModelError(f"config.json: missing field '{self.prefix}{name}'")
        wanted = "a number above 0" if least is None else f"a number of at least {least:g}"
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise self.wrong(name, wanted, value)
        if not (value > 0 if least is None else value >= least):
            raise self.wrong(name, wanted, value)
        return float(value)

    def switch(self, rule: bool | str, default: bool = False) -> bool:
        """true or false; a rule of the family that is no field's name is the answer itself."""
        if isinstance(rule, bool):
            return rule
        value = self.get(rule, default)
        if not isinstance(value, bool):
            raise self.wrong(rule, "true or false", value)
        return value

    def token(self, name: str, vocab_size: int) -> int | None:
        """A token id, or None where it is null or absent."""
        value = self.get(name)
        if value is not None and (not _is_whole(value) or not 0 <= value < vocab_size):
            raise self.wrong(name, f"null or a token id (0..{vocab_size - 1}, by vocab_size)", value)
        return value

    def nested(self, name: str) -> _Fields:
        """The object `name`; one without fields where it is null or absent."""
        value = self.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.wrong(name, "null or an object", value)
        return _Fields(value or {}, self.family, name)

    def only(self, name: str, value, known):
        """`value` if it is one of `known`; otherwise a ModelError naming the field."""
        if value not in known:
            told = f"{self.prefix}{name}={_told(value)} is not supported; known: {', '.join(map(str, known))}"
            raise ModelError(f"config.json: {told}")
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
    old, new = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    given, where = (old, "rope_scaling") if old.hf else (new, "rope_parameters")
    if any(isinstance(v, Mapping) for v in given.hf.values()):
        raise ModelError(f"config.json: {where}: one rotary embedding for each layer type is not supported")
    theta = (fields if given.get("rope_theta") is None else given).number("rope_theta", 10000.0)
    for place in (given, fields):
        if place.get("partial_rotary_factor") is not None:
            place.only("partial_rotary_factor", place.number("partial_rotary_factor"), (1.0,))
    kind = given.only("rope_type", given.get("rope_type", given.get("type", "default")), tuple(_ROPE_FIELDS))
    used = {name: _rope_value(fields, given, kind, name) for name in _ROPE_FIELDS[kind]}
    used = {name: value for name, value in used.items() if value is not None}
    if kind == "llama3" and used["high_freq_factor"] <= used["low_freq_factor"]:
        low, high = used["low_freq_factor"], used["high_freq_factor"]
        raise ModelError(f"config.json: {where}.high_freq_factor={high} must be above low_freq_factor={low}")
    return theta, RopeScaling(kind, **used)


def _rope_value(fields: _Fields, given: _Fields, kind: str, name: str) -> Any:
    """One field of RopeScaling; None where the file leaves it to the default."""
    original = next((f for f in (fields, given) if f.get("original_max_position_embeddings") is not None), None)
    if name == "original_max_position":
        return (original or fields).integer("original_max_position_embeddings" if original else "max_position_embeddings")
    if kind == "yarn" and name == "factor" and given.get(name) is None and original:
        return fields.integer("max_position_embeddings") / original.integer("original_max_position_embeddings")
    if given.get(name) is None:
        if name in _ROPE_REQUIRED:
            raise ModelError(f"config.json: {given.prefix}{name} is missing (rope_type {kind!r} needs it)")
        return None
    if name == "truncate":
        return given.switch(name)
    return given.number(name, least=0.0 if name.startswith("mscale") else None)


def _windows_from_hf(fields: _Fields, n_layers: int) -> tuple[int | None, ...]:
    rule, types = fields.family.windows, fields.get("layer_types")
    if rule == "none" or fields.get("sliding_window") is None:
        return ()
    window = fields.integer("sliding_window")
    if types is not None and not _are_strings(types):
        raise fields.wrong("layer_types", "a list with a name for each layer", types)
    if rule == "by_layer" and not fields.switch("use_sliding_window"):
        if "sliding_attention" in (types or ()):
            raise ModelError("config.json: layer_types asks for sliding_attention but use_sliding_window is false")
        return ()
    if types is None:
        first = 0 if rule != "by_layer" else fields.integer("max_window_layers", least=0)
        types = ["full_attention" if i < first else "sliding_attention" for i in range(n_layers)]
    if len(types) != n_layers:
        raise ModelError(f"config.json: layer_types names {len(types)} layers, num_hidden_layers is {n_layers}")
    for kind in types:
        fields.only("layer_types", kind, ("full_attention", "sliding_attention"))
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()


def _dtype_from_hf(fields: _Fields) -> str:
    given = next((v for v in (fields.get("dtype"), fields.get("torch_dtype")) if v is not None), "float32")
    name = given.removeprefix("torch.") if isinstance(given, str) else given
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
