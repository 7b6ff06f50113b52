"""The model families as a table of differences (`models/hf_config.py` reads and writes their `config.json`).

To add a family whose parts are all there: add a row to FAMILIES (and its parity case to tests/models/parity_cases.py). A new part
is a field of `ModelConfig` and a branch in `models/layers.py`; where its tensors lie is said in `models/tensors.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.tensors import TENSORS, Tensor


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

ACTIVATION_NAMES = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "gelu_new", "gelu_fast")
DTYPES = ("float32", "bfloat16", "float16")


def tensor_of(cfg: ModelConfig, leaf: str) -> Tensor:
    """The checkpoint tensor of the parameter `leaf`, named like "blocks.q"."""
    return (FAMILIES[cfg.family].tensors.get(leaf) or TENSORS[leaf]).at(cfg)
