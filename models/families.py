"""The model families as a table of differences (`models/hf_config.py` reads and writes their `config.json`).

To add a family whose block is the same pre-norm decoder: add a row to FAMILIES (and its parity case to
tests/models/parity_cases.py). A new kind of block belongs in `models/transformer.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.config import ModelConfig


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
