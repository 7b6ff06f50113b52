"""The model families as a table of differences (`models/hf_config.py` reads and writes their `config.json`).

To add a family whose parts are all there: add a row to FAMILIES (and its parity case to tests/models/parity_cases.py). A new part
is a field of `ModelConfig` and a branch in `models/layers.py`; where its tensors lie is said in `models/tensors.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.tensors import GEMMA_TENSORS, OLMO2_TENSORS, PHI3_TENSORS, TENSORS, Tensor


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets one family apart. A bias is True, False or the name of the config field that decides.

    windows: "none"; "all" or "listed" (`sliding_window` on every layer, or on those of `layer_types`, which "listed"
      always writes); "by_layer" (if `use_sliding_window`: on those of `layer_types`, or from `max_window_layers` on); "pattern" (on
      those of `layer_types`, or on all but every `sliding_window_pattern`-th).
    rope: "whole"; "part" (of a head: `partial_rotary_factor`); "by_window" (layers with a window have their own base); "none".
    numbers, optional_numbers: fields of ModelConfig that are a number of config.json; the optional ones may be null there.
    names: what config.json calls a field, where not by the usual name; the first is written, () is not there at all.
    only: fields of config.json with the values of them that are implemented. always: fields that are written as they are here.
    defaults: what `transformers` assumes where config.json is silent. tensors: what is stored elsewhere than TENSORS.
    The rest are the fields of ModelConfig of the same name; embed_scale: by the square root of d_model.
    """

    model_type: str
    architecture: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: str = "none"
    rope: str = "whole"
    rope_kinds: tuple[str, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
    norm: str = "rms"
    block: str = "pre"
    qk_norm_over: str = "head"
    embed_scale: bool = False
    numbers: dict[str, str] = dataclasses.field(default_factory=dict)
    optional_numbers: dict[str, str] = dataclasses.field(default_factory=dict)
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    always: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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
    Family(
        "olmo2",
        "Olmo2ForCausalLM",
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
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ROWS}

ACTIVATION_NAMES = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "gelu_new", "gelu_fast")
DTYPES = ("float32", "bfloat16", "float16")


def tensor_of(cfg: ModelConfig, leaf: str) -> Tensor:
    """The checkpoint tensor of the parameter `leaf`, named like "blocks.q"."""
    return (FAMILIES[cfg.family].tensors.get(leaf) or TENSORS[leaf]).at(cfg)
