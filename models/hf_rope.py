"""Both directions between the rotary fields of a Hugging Face `config.json` and `ModelConfig`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, RopeScaling
from models.errors import ModelError
from models.families import Family
from models.hf_fields import Fields

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


def rope_from_hf(fields: Fields, head_dim: int) -> dict[str, Any]:
    """The rotary fields of ModelConfig, by name."""
    rule = fields.family.rope
    if rule == "none":
        return {}
    if rule == "units":
        return {"rotary_dim": _rotary_dim(fields, "rotary_dim", fields.integer("rotary_dim"), head_dim)}
    old, new = fields.nested("rope_scaling"), fields.nested("rope_parameters")
    found: dict[str, Any] = {}
    if rule == "by_window":
        new, found["local_rope_theta"] = _by_window(fields, new)
    given = old if old.hf else new
    if any(isinstance(v, Mapping) for v in given.hf.values()):
        raise ModelError(f"config.json: {given.inside}: one rotary embedding for each layer type is not supported")
    theta = (fields if given.get("rope_theta") is None else given).number("rope_theta", 10000.0)
    if rule == "part":
        place = given if given.get("partial_rotary_factor") is not None else fields
        units = int(head_dim * place.number("partial_rotary_factor", 1.0))
        found["rotary_dim"] = _rotary_dim(place, "partial_rotary_factor", units, head_dim)
    else:
        for place in (given, fields):
            if place.get("partial_rotary_factor") is not None:
                place.only("partial_rotary_factor", place.number("partial_rotary_factor"), (1.0,))
    kind = given.only("rope_type", given.get("rope_type", given.get("type", "default")), fields.family.rope_kinds)
    used = {name: _rope_value(fields, given, kind, name) for name in _ROPE_FIELDS[kind]}
    used = {name: value for name, value in used.items() if value is not None}
    if kind == "llama3" and used["high_freq_factor"] <= used["low_freq_factor"]:
        low, high = used["low_freq_factor"], used["high_freq_factor"]
        raise ModelError(f"config.json: {given.prefix}high_freq_factor={high} must be above low_freq_factor={low}")
    return {"rope_theta": theta, "rope_scaling": RopeScaling(kind, **used), **found}


def _by_window(fields: Fields, new: Fields) -> tuple[Fields, float]:
    """(the rotary parameters of layers without a window, the base of those with one, which are never scaled)."""
    full, sliding = new.nested("full_attention"), new.nested("sliding_attention")
    if new.hf and not (full.hf or sliding.hf):
        raise fields.wrong("rope_parameters", "an object with full_attention and sliding_attention", dict(new.hf))
    sliding.only("rope_type", sliding.get("rope_type", sliding.get("type", "default")), ("default",))
    if sliding.get("rope_theta") is None:
        return full, fields.number("rope_local_base_freq")
    return full, sliding.number("rope_theta")


def _rotary_dim(place: Fields, name: str, units: int, head_dim: int) -> int | None:
    """How many units of a head are rotated, as the field `name` has it; None for all."""
    if units % 2 or not 0 < units <= head_dim:
        told = f"{place.told(name)}={place.get(name)} rotates {units} of head_dim={head_dim} units"
        raise ModelError(f"config.json: {told}; it must be an even number of them")
    return None if units == head_dim else units


def _rope_value(fields: Fields, given: Fields, kind: str, name: str) -> Any:
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


def rope_to_hf(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    """transformers 5 reads rope_parameters; 4 reads rope_theta and rope_scaling (and what else the family has beside them)."""
    if family.rope == "none":
        return {}
    if family.rope == "units":
        return {"rotary_dim": cfg.rotary_dim or cfg.head_dim}
    scaling: dict[str, Any] = {"rope_type": cfg.rope_scaling.kind}
    for name in _ROPE_FIELDS[cfg.rope_scaling.kind]:
        value = getattr(cfg.rope_scaling, name)
        if value is not None:
            scaling["original_max_position_embeddings" if name == "original_max_position" else name] = value
    hf = {"rope_theta": cfg.rope_theta, "rope_scaling": None if cfg.rope_scaling.kind == "default" else scaling}
    whole = {"rope_theta": cfg.rope_theta, **scaling}
    if family.rope == "by_window":
        local = {"rope_type": "default", "rope_theta": cfg.local_rope_theta}
        return hf | {
            "rope_local_base_freq": cfg.local_rope_theta,
            "rope_parameters": {"full_attention": whole, "sliding_attention": local},
        }
    if family.rope == "part":
        factor = 1.0 if cfg.rotary_dim is None else cfg.rotary_dim / cfg.head_dim
        if int(cfg.head_dim * factor) != (cfg.rotary_dim or cfg.head_dim):  # rounded down below the whole number
            factor = math.nextafter(factor, 2)
        hf["partial_rotary_factor"] = whole["partial_rotary_factor"] = factor
    named = {key: value for name, value in hf.items() for key in family.names.get(name, (name,))[:1]}
    return named | {"rope_parameters": whole}
