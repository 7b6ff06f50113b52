"""Both directions between a Hugging Face `config.json` and `ModelConfig`.

Every field that is read is read through `Fields`, which knows the family's defaults and says, by name, what is wrong:
JSON that was written by hand or by another program holds strings for numbers, nulls and zeros.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.errors import ModelError
from models.families import ACTIVATION_NAMES, DTYPES, FAMILIES, Family
from models.hf_fields import Fields, are_strings, is_whole, told_value
from models.hf_rope import rope_from_hf, rope_to_hf

# --- config.json -> ModelConfig --------------------------------------------------------------------------------------


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Reads a `config.json` of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Raises ModelError naming the field for an unknown architecture, for a value of the wrong type or out of range, and for
    any option that would change the result but is not implemented.
    """
    if not isinstance(hf, Mapping):
        raise ModelError(f"config.json: must hold a JSON object, not {told_value(hf)}")
    family = _family_of(hf)
    fields = Fields(hf, family)
    n_layers, n_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    d_model, vocab_size = fields.integer("hidden_size"), fields.integer("vocab_size")
    n_kv_heads = fields.integer("num_key_value_heads", n_heads)
    if n_heads % n_kv_heads:
        told = f"num_attention_heads={n_heads} is not a multiple of num_key_value_heads={n_kv_heads}"
        raise ModelError(f"config.json: {told}")
    if fields.get("head_dim") is None and d_model % n_heads:
        raise ModelError(f"config.json: hidden_size={d_model} is not a multiple of num_attention_heads={n_heads}")
    head_dim = fields.integer("head_dim", d_model // n_heads)
    if head_dim % 2 and family.rope in ("whole", "by_window"):
        raise ModelError(f"config.json: head_dim={head_dim} is odd; rotary embeddings need an even one")
    for name, known in family.only.items():
        fields.only(name, fields.get(name), known)
    if hf.get("quantization_config"):
        raise ModelError("config.json: quantization_config is not supported: give the full-precision checkpoint")
    numbers = {ours: fields.number(name) for ours, name in family.numbers.items()}
    numbers |= {ours: fields.optional_number(name) for ours, name in family.optional_numbers.items()}
    block = family.block
    if not isinstance(block, str):
        switch, on, off = block
        block = on if fields.switch(switch) else off
    experts = {}
    if family.mlp == "experts":
        experts = {"n_experts": fields.integer("num_experts"), "experts_per_token": fields.integer("num_experts_per_tok")}
        experts["renormalise_experts"] = fields.switch(family.renormalise_experts)
        if experts["experts_per_token"] > experts["n_experts"]:
            told = f"{fields.told('num_experts')}={experts['n_experts']}"
            raise ModelError(f"config.json: num_experts_per_tok={experts['experts_per_token']} is more than {told}")
    derived = 4 * d_model if fields.key("intermediate_size") == "n_inner" else None
    return ModelConfig(
        family=family.model_type,
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=fields.integer("intermediate_size", derived),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
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
        norm=family.norm,
        block=block,
        positions=family.positions,
        rotary_pairs=family.rotary_pairs,
        mlp=family.mlp,
        head_bias=family.head_bias,
        qk_norm_over=family.qk_norm_over,
        embed_scale=d_model**0.5 if family.embed_scale else 1.0,
        **rope_from_hf(fields, head_dim),
        **numbers,
        **experts,
    )


def token_ids(value: Any, vocab_size: int, where: str = "config.json") -> tuple[int, ...]:
    """A Hugging Face `eos_token_id` (none, one or several) as a tuple; ModelError, naming `where`, for anything else."""
    given = value if isinstance(value, list) else [] if value is None else [value]
    for one in given:
        if not is_whole(one) or not 0 <= one < vocab_size:
            wanted = f"null, a token id (0..{vocab_size - 1}, by vocab_size) or a list of them"
            raise ModelError(f"{where}: eos_token_id must be {wanted}, not {told_value(value)}")
    return tuple(given)


def _family_of(hf: Mapping[str, Any]) -> Family:
    """The family that config.json names: by `architectures`, and by `model_type` where that is absent."""
    by_architecture = {f.architecture: f for f in FAMILIES.values()}
    architectures, model_type = hf.get("architectures"), hf.get("model_type")
    if architectures is not None and not are_strings(architectures):
        raise ModelError(f"config.json: architectures must be a list of names, not {told_value(architectures)}")
    if model_type is not None and not isinstance(model_type, str):
        raise ModelError(f"config.json: model_type must be a name, not {told_value(model_type)}")
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


def _windows_from_hf(fields: Fields, n_layers: int) -> tuple[int | None, ...]:
    rule, types = fields.family.windows, fields.get("layer_types")
    if rule == "none" or (fields.get("sliding_window") is None and rule != "pattern"):
        return ()
    window = fields.integer("sliding_window")
    if types is not None and not are_strings(types):
        raise fields.wrong("layer_types", "a list with a name for each layer", types)
    if rule == "by_layer" and not fields.switch("use_sliding_window"):
        if "sliding_attention" in (types or ()):
            raise ModelError("config.json: layer_types asks for sliding_attention but use_sliding_window is false")
        return ()
    if types is None and rule == "pattern":
        every = fields.integer("sliding_window_pattern")
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(n_layers)]
    elif types is None:
        first = 0 if rule != "by_layer" else fields.integer("max_window_layers", least=0)
        types = ["full_attention" if i < first else "sliding_attention" for i in range(n_layers)]
    if len(types) != n_layers:
        raise ModelError(f"config.json: layer_types names {len(types)} layers, num_hidden_layers is {n_layers}")
    for kind in types:
        fields.only("layer_types", kind, ("full_attention", "sliding_attention"))
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return windows if any(windows) else ()


def _dtype_from_hf(fields: Fields) -> str:
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
    usual: dict[str, Any] = {
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
    hf: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for name, value in usual.items():
        hf |= dict.fromkeys(family.names.get(name, (name,))[:1], value)
    for name, theirs in (family.numbers | family.optional_numbers).items():
        value = getattr(cfg, name)
        hf[theirs] = int(value) if name in family.numbers and value is not None and float(value).is_integer() else value
    hf |= family.always
    if family.mlp == "experts":
        hf |= {family.names["num_experts"][0]: cfg.n_experts, "num_experts_per_tok": cfg.experts_per_token}
    switches = {family.qkv_bias: cfg.qkv_bias, family.mlp_bias: cfg.mlp_bias, family.renormalise_experts: cfg.renormalise_experts}
    for rule, value in switches.items():
        if isinstance(rule, str):
            hf[rule] = value
    if not isinstance(family.block, str):
        hf[family.block[0]] = cfg.block == family.block[1]
    hf |= rope_to_hf(cfg, family) | _windows_to_hf(cfg, family)
    back = config_from_hf(hf)
    model = [f for f in dataclasses.fields(cfg) if f.name != "attention"]  # which is said of a run
    lost = [f.name for f in model if getattr(back, f.name) != getattr(cfg, f.name)]
    if lost and not (lost == ["dtype"] and cfg.dtype == "float16"):
        told = ", ".join(f"{name}={getattr(cfg, name)!r}" for name in lost)
        raise ModelError(f"a {cfg.family} config.json cannot express {told}")
    return hf


def _windows_to_hf(cfg: ModelConfig, family: Family) -> dict[str, Any]:
    window = next((w for w in cfg.layer_windows if w is not None), None)
    sliding = [cfg.window(i) is not None for i in range(cfg.n_layers)]
    types = {"layer_types": ["sliding_attention" if s else "full_attention" for s in sliding]}
    if family.windows == "none":
        return {}
    if family.windows == "all":
        # transformers takes a Mistral with layer_types for its Ministral class, so they stand only where they must.
        return {"sliding_window": window} | (types if len(set(sliding)) > 1 else {})
    if family.windows in ("listed", "pattern"):
        return {"sliding_window": window or cfg.max_position, **types}
    first = sliding.index(True) if any(sliding) else cfg.n_layers
    return {"use_sliding_window": any(sliding), "sliding_window": window, "max_window_layers": first, **types}
