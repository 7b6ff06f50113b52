"""The model families as a table of differences (`models/hf_config.py` reads and writes their `config.json`).

To add a family whose parts are all there: add a row to FAMILIES (and its parity case to tests/models/parity_cases.py). A new part
is a field of `ModelConfig` and a branch in `models/layers.py`; where its tensors lie is said in `models/tensors.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from models.config import ModelConfig
from models.tensors import (
    GEMMA_TENSORS,
    GPT2_TENSORS,
    GPT_NEOX_TENSORS,
    GPTJ_TENSORS,
    MIXTRAL_TENSORS,
    OLMO2_TENSORS,
    PHI3_TENSORS,
    QWEN3_MOE_TENSORS,
    TENSORS,
    Tensor,
)


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one family apart. A bias, and renormalise_experts, is True, False or the name of the config field that decides.

    models: what people call them.
    windows: "none"; "all" or "listed" (`sliding_window` on every layer, or on those of `layer_types`, which "listed"
      always writes); "by_layer" (if `use_sliding_window`: on those of `layer_types`, or from `max_window_layers` on); "pattern" (on
      those of `layer_types`, or on all but every `sliding_window_pattern`-th).
    rope: "whole"; "part" (of a head: `partial_rotary_factor`); "units" (a number of them: `rotary_dim`); "by_window" (layers with a
      window have their own base); "none".
    block: one of ModelConfig's, or (the switch that decides, which one where true, which one where false).
    numbers, optional_numbers: fields of ModelConfig that are a number of config.json; the optional ones may be null there.
    names: what config.json calls a field, where not by the usual name; the first is written, () is not there at all.
    only: fields of config.json with the values of them that are implemented. always: fields that are written as they are here.
    defaults: what `transformers` assumes where config.json is silent. tensors: what is stored elsewhere than TENSORS.
    name_of: what a tensor is called here that a checkpoint calls otherwise. buffers: ends of names of tensors that are not read.
    The rest are the fields of ModelConfig of the same name; embed_scale: by the square root of d_model.
    """

    model_type: str
    architecture: str
    models: str = ""
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: str = "none"
    rope: str = "whole"
    rope_kinds: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
    norm: str = "rms"
    block: str | tuple[str, str, str] = "pre"
    positions: str = "rotary"
    rotary_pairs: str = "half"
    mlp: str = "gated"
    qk_norm_over: str = "head"
    embed_scale: bool = False
    head_bias: bool = False
    renormalise_experts: bool | str = False
    numbers: dict[str, str] = dataclasses.field(default_factory=dict)
    optional_numbers: dict[str, str] = dataclasses.field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    name_of: Callable[[str], str] = str
    buffers: tuple[str, ...] = ()


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
_GEMMA: dict[str, Any] = {
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "norm": "rms_plus_one",
    "block": "pre_post",
    "windows": "pattern",
    "embed_scale": True,
    "numbers": {"query_scalar": "query_pre_attn_scalar"},
    "tensors": GEMMA_TENSORS,
}
_GEMMA_NAMES = {"hidden_act": ("hidden_activation",)}
_GEMMA_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
}
_GPT: dict[str, Any] = {"mlp_bias": True, "norm": "layer", "mlp": "plain"}
# The class of transformers derives the width of a head and has as many key/value heads as heads.
_GPT_NAMES: dict[str, tuple[str, ...]] = {"head_dim": (), "num_key_value_heads": ()}
_GPT2_NAMES = {
    **_GPT_NAMES,
    "hidden_size": ("n_embd", "hidden_size"),
    "num_hidden_layers": ("n_layer", "num_hidden_layers"),
    "num_attention_heads": ("n_head", "num_attention_heads"),
    "max_position_embeddings": ("n_positions", "max_position_embeddings"),
    "intermediate_size": ("n_inner",),
    "hidden_act": ("activation_function",),
    "rms_norm_eps": ("layer_norm_epsilon",),
    "attention_dropout": ("attn_pdrop",),
}
_GPT2_DEFAULTS = {"hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "bos_token_id": 50256, "eos_token_id": 50256}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0}


def _below_transformer(name: str) -> str:
    """The first GPT-2 checkpoints are of the model without its head, whose names lack the "transformer."."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


_ROWS = (
    Family(
        "llama",
        "LlamaForCausalLM",
        models="Llama 2, 3.x",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults=_LLAMA_DEFAULTS,
    ),
    Family("qwen2", "Qwen2ForCausalLM", models="Qwen2, Qwen2.5", qkv_bias=True, windows="by_layer", defaults=_QWEN_DEFAULTS),
    Family(
        "qwen3",
        "Qwen3ForCausalLM",
        models="Qwen3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        windows="by_layer",
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
    ),
    Family("mistral", "MistralForCausalLM", models="Mistral", windows="all", defaults=_MISTRAL_DEFAULTS),
    Family(
        "mixtral",
        "MixtralForCausalLM",
        models="Mixtral",
        windows="all",
        mlp="experts",
        renormalise_experts=True,
        names={"num_experts": ("num_local_experts", "num_experts")},
        only={"layer_types": (None,), "router_jitter_noise": (0,)},
        defaults={
            **_MISTRAL_DEFAULTS,
            "rope_theta": 1e6,
            "sliding_window": None,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0,
            "rms_norm_eps": 1e-5,
        },
        tensors=MIXTRAL_TENSORS,
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        models="Qwen3-MoE",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        mlp="experts",
        renormalise_experts="norm_topk_prob",
        names={"num_experts": ("num_experts", "num_local_experts"), "intermediate_size": ("moe_intermediate_size",)},
        # Every layer has experts; transformers' class has one window for all layers, and no checkpoint has one.
        only={"decoder_sparse_step": (1,), "mlp_only_layers": (None, []), "use_sliding_window": (False, None)},
        defaults={
            **_QWEN_DEFAULTS,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "intermediate_size": 768,
            "decoder_sparse_step": 1,
        },
        tensors=QWEN3_MOE_TENSORS,
    ),
    Family("ministral", "MinistralForCausalLM", models="Ministral", windows="listed", defaults=_MISTRAL_DEFAULTS),
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
        models="OLMo 2",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm=True,
        qk_norm_over="all",
        norm="rms_fp32",
        block="post",
        defaults={"eos_token_id": 50279, "pad_token_id": 1, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        tensors=OLMO2_TENSORS,
    ),
    Family(
        "phi3",
        "Phi3ForCausalLM",
        models="Phi-3",
        windows="all",
        rope="part",
        rope_kinds=("default",),
        # transformers knows one window for all layers and takes no bias.
        only={"layer_types": (None,), "attention_bias": (False,)},
        defaults={
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 1.0,
            "attention_bias": False,
        },
        tensors=PHI3_TENSORS,
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        models="Gemma 2",
        **_GEMMA,
        optional_numbers={"attn_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"},
        names={**_GEMMA_NAMES, "sliding_window_pattern": ()},
        only={"use_bidirectional_attention": (None, False)},
        defaults={
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        models="Gemma 3 (text)",
        **_GEMMA,
        qk_norm=True,
        rope="by_window",
        optional_numbers={"logit_softcap": "final_logit_softcapping"},
        names=_GEMMA_NAMES,
        # What transformers' class would do with a cap on the scores is not what it says: it leaves it out.
        only={"use_bidirectional_attention": (None, False), "attn_logit_softcapping": (None,)},
        defaults={
            **_GEMMA_DEFAULTS,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
        },
    ),
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        models="GPT-2",
        **_GPT,
        qkv_bias=True,
        o_bias=True,
        positions="learned",
        rope="none",
        names=_GPT2_NAMES,
        only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
        always=_NO_DROPOUT,
        defaults={
            **_GPT2_DEFAULTS,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        tensors=GPT2_TENSORS,
        name_of=_below_transformer,
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        models="GPT-NeoX, Pythia",
        **_GPT,
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        block=("use_parallel_residual", "parallel", "pre"),
        rope="part",
        names={
            **_GPT_NAMES,
            "rms_norm_eps": ("layer_norm_eps",),
            "rope_theta": ("rotary_emb_base",),
            "partial_rotary_factor": ("rotary_pct",),
        },
        always={"hidden_dropout": 0.0},
        defaults={
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "attention_bias": True,
            "use_parallel_residual": True,
            "partial_rotary_factor": 0.25,
        },
        tensors=GPT_NEOX_TENSORS,
        name_of=lambda name: name.replace("lm_head.", "embed_out."),  # as transformers calls it from version 5 on
        buffers=(".attention.bias", ".attention.masked_bias"),
    ),
    Family(
        "gptj",
        "GPTJForCausalLM",
        models="GPT-J",
        **_GPT,
        block="parallel_shared",
        rope="units",
        rotary_pairs="adjacent",
        head_bias=True,
        names=_GPT2_NAMES,
        always=_NO_DROPOUT,
        defaults={**_GPT2_DEFAULTS, "max_position_embeddings": 2048, "rotary_dim": 64},
        tensors=GPTJ_TENSORS,
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}

ACTIVATION_NAMES = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "gelu_new", "gelu_fast")
DTYPES = ("float32", "bfloat16", "float16")


def tensor_of(cfg: ModelConfig, leaf: str) -> Tensor:
    """The checkpoint tensor of the parameter `leaf`, named like "blocks.q"."""
    return (FAMILIES[cfg.family].tensors.get(leaf) or TENSORS[leaf]).at(cfg)

_BLOCKS = {
    "pre": "norms before attention and MLP",
    "post": "norms after attention and MLP",
    "pre_post": "norms before and after attention and MLP",
    "parallel": "attention beside MLP, a norm each",
    "parallel_shared": "attention beside MLP, one norm",
}
_NORMS = {"rms": "RMS", "rms_fp32": "RMS, scaled in fp32", "rms_plus_one": "RMS, scaled by 1 + w in fp32", "layer": "LayerNorm"}
_ROPES = {
    "whole": "rotary",
    "part": "rotary, of part of a head",
    "units": "rotary, of part of a head",
    "by_window": "rotary, a base of their own for layers with a window",
    "none": "learned",
}
_WINDOWS = {"none": "", "all": "on all layers", "listed": "by layer", "by_layer": "by layer", "pattern": "on all but every n-th layer"}


def table() -> str:
    """The families as a Markdown table, which docs/families.md holds."""
    rows = [("models", "`model_type`", "block", "norm", "positions", "MLP", "windows", "besides"), ("---",) * 8]
    for family in FAMILIES.values():
        blocks = [_BLOCKS[name] for name in ((family.block,) if isinstance(family.block, str) else family.block[1:])]
        caps = {"attn_softcap": "soft-cap of scores", "logit_softcap": "soft-cap of logits"}
        besides = [
            *(["q/k norm of each head" if family.qk_norm_over == "head" else "q/k norm over all heads"] if family.qk_norm else []),
            *(told for name, told in caps.items() if name in family.optional_numbers),
            *(["scaled embeddings"] if family.embed_scale else []),
            *(["query scale"] if family.numbers else []),
            *(["bias on the logits"] if family.head_bias else []),
            *(["fused tensors"] if any(tensor.beside for tensor in family.tensors.values()) else []),
        ]
        positions = _ROPES[family.rope] + (", adjacent pairs" if family.rotary_pairs == "adjacent" else "")
        told = (" or ".join(blocks), _NORMS[family.norm], positions, family.mlp, _WINDOWS[family.windows], ", ".join(besides))
        rows.append((family.models, f"`{family.model_type}`", *told))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
