"""Where parameters lie in a checkpoint's tensors: axes, order, and parts of one tensor, for reading and for writing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one parameter lives in a checkpoint.

    name: "{layer}" stands for the layer's number, "{expert}" for an expert's; such a leaf is stacked on a leading axis for each, which are
      not counted below.
    ours: a letter for each axis of our leaf. stored: the axes of the tensor, each a run of our letters flattened
      together; torch's matrices are [out, in], ours [in..., out...], so "DNH" is stored as "NH D".
    Several leaves may lie in one tensor. A "|" then stands where they follow each other, and `beside` names what each of them has
      there, in order, `place` which of them is ours: "|NH D" with beside ("NH", "KH", "KH") has all queries first, then the keys,
      then the values; "N|H D" with beside ("H", "H", "H") has these three for each head.
    span: (where our part begins, its size, the size of all parts), as `at` fills it in.
    """

    name: str
    ours: str
    stored: str
    beside: tuple[str, ...] = ()
    place: int = 0
    span: tuple[int, int, int] | None = None

    def at(self, cfg: ModelConfig) -> Tensor:
        """This tensor in a model of known sizes."""
        if not self.beside:
            return self
        sizes = {"D": cfg.d_model, "N": cfg.n_heads, "K": cfg.n_kv_heads, "H": cfg.head_dim, "F": cfg.d_ff}
        parts = [math.prod(sizes[letter] for letter in run) for run in self.beside]
        return dataclasses.replace(self, span=(sum(parts[: self.place]), parts[self.place], sum(parts)))

    def stacked(self, cfg: ModelConfig) -> tuple[int, ...]:
        """The sizes of the axes that our leaf has in front: none, layers, or layers and experts."""
        return tuple(size for size, mark in ((cfg.n_layers, "{layer}"), (cfg.n_experts, "{expert}")) if mark in self.name)

    def names(self, cfg: ModelConfig) -> np.ndarray:
        """The tensor's name at each place of the axes in front (strings, of the shape of `stacked`)."""
        sizes = self.stacked(cfg)
        named = [self.name.format(**dict(zip(("layer", "expert"), at, strict=False))) for at in np.ndindex(*sizes)]
        return np.array(named, object).reshape(sizes)

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in the file of the tensor that holds our (unstacked) leaf of `shape`."""
        sizes = dict(zip(self.ours, shape, strict=True))
        shapes = []
        for group in self.stored.split():
            shared, bar, own = group.rpartition("|")
            whole = self._span[2] if bar else math.prod(sizes[a] for a in own)
            shapes.append(math.prod(sizes[a] for a in shared) * whole)
        return tuple(shapes)

    def write(self, tensor: np.ndarray, value: np.ndarray) -> None:
        """Puts our (unstacked) leaf where it belongs in the tensor of `stored_shape`."""
        order = [self.ours.index(a) for a in self._letters]
        place = self._part(tensor)
        place[...] = value.transpose(order).reshape(place.shape)

    def to_stored(self, value: np.ndarray) -> np.ndarray:
        """Our (unstacked) leaf that is a tensor of its own, laid out as in the file."""
        return value.transpose([self.ours.index(a) for a in self._letters]).reshape(self.stored_shape(value.shape))

    def read(self, read: Callable[[tuple[slice, ...]], np.ndarray], shape: Sequence[int], index: Sequence[slice]):
        """The part of our (unstacked) leaf of `shape` within `index`, through `read(slices of the stored tensor)`.

        Reads no more than it must as long as only the first letter of each run is cut (which is how we shard); of leaves that
        follow each other for each head, it reads all of those heads.
        """
        sizes = dict(zip(self.ours, shape, strict=True))
        cut = dict(zip(self.ours, index, strict=True))
        wanted = []
        for group in self.stored.split():
            shared, bar, own = group.rpartition("|")
            first, *rest = shared + own
            start, stop, _ = cut[first].indices(sizes[first])
            if shared:
                row, offset = math.prod(sizes[a] for a in shared[1:]) * self._span[2], 0
            else:
                row, offset = math.prod(sizes[a] for a in rest), self._span[0] if bar else 0
            wanted.append(slice(offset + start * row, offset + stop * row))
            sizes[first], cut[first] = stop - start, slice(None)
        got = read(tuple(wanted))
        got = self._part(got) if self._shares else got
        part = got.reshape([sizes[a] for a in self._letters])
        return part.transpose([self._letters.index(a) for a in self.ours])[tuple(cut[a] for a in self.ours)]

    def pieces(self, shape: Sequence[int], index: Sequence[slice], numbers: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
        """(where in the part, index) for pieces of the part `index` of our (unstacked) leaf of `shape`, each within so many rows of the
        stored tensor as have at most `numbers` numbers, or within one entry of the first letter of `stored`."""
        axis = self.ours.index(self._letters[0])
        start, stop, _ = index[axis].indices(shape[axis])
        step = max(numbers // math.prod((*shape[:axis], *shape[axis + 1 :])), 1)
        for at in range(start, stop, step):
            end = min(at + step, stop)
            inside = (*(slice(None),) * axis, slice(at - start, end - start))
            yield inside, (*index[:axis], slice(at, end), *index[axis + 1 :])

    @property
    def _letters(self) -> str:
        return self.stored.replace(" ", "").replace("|", "")

    @property
    def _shares(self) -> bool:
        """Whether the leaves follow each other within an axis, again and again."""
        return any(group.rpartition("|")[0] for group in self.stored.split())

    @property
    def _span(self) -> tuple[int, int, int]:
        assert self.span is not None, f"{self.name}: several leaves lie in it, so its place depends on the model: use `at`"
        return self.span

    def _part(self, tensor: np.ndarray) -> np.ndarray:
        """A view of our part of (a piece of) the stored tensor; the axis with the "|" becomes two."""
        for axis, group in enumerate(self.stored.split()):
            if "|" in group:
                start, size, whole = self._span
                before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
                split = tensor.reshape(*before, tensor.shape[axis] // whole, whole, *after)
                return split[(slice(None),) * (axis + 1) + (slice(start, start + size),)]
        return tensor


# One for each parameter, where most families keep it; a family lists only those it keeps elsewhere.
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

# Blocks with norms after attention and MLP: post_attention_layernorm is then what its name says.
POST_NORMS: dict[str, Tensor] = {
    "blocks.attn_post_norm": Tensor(_LAYER + "post_attention_layernorm.weight", "D", "D"),
    "blocks.mlp_post_norm": Tensor(_LAYER + "post_feedforward_layernorm.weight", "D", "D"),
}
OLMO2_TENSORS: dict[str, Tensor] = {
    **POST_NORMS,
    "blocks.q_norm": Tensor(_LAYER + "self_attn.q_norm.weight", "NH", "NH"),
    "blocks.k_norm": Tensor(_LAYER + "self_attn.k_norm.weight", "KH", "KH"),
}
GEMMA_TENSORS: dict[str, Tensor] = {**POST_NORMS, "blocks.mlp_norm": Tensor(_LAYER + "pre_feedforward_layernorm.weight", "D", "D")}

_QKV = ("NH", "KH", "KH")
PHI3_TENSORS: dict[str, Tensor] = {
    "blocks.q": Tensor(_LAYER + "self_attn.qkv_proj.weight", "DNH", "|NH D", _QKV, 0),
    "blocks.k": Tensor(_LAYER + "self_attn.qkv_proj.weight", "DKH", "|KH D", _QKV, 1),
    "blocks.v": Tensor(_LAYER + "self_attn.qkv_proj.weight", "DKH", "|KH D", _QKV, 2),
    "blocks.gate": Tensor(_LAYER + "mlp.gate_up_proj.weight", "DF", "|F D", ("F", "F"), 0),
    "blocks.up": Tensor(_LAYER + "mlp.gate_up_proj.weight", "DF", "|F D", ("F", "F"), 1),
}


def _norm(leaf: str, name: str) -> dict[str, Tensor]:
    """LayerNorm's scale and bias; leaf like "blocks.attn_norm"."""
    bias = f"{leaf.removesuffix('.scale')}.bias" if leaf.endswith(".scale") else f"{leaf}_bias"
    return {leaf: Tensor(f"{name}.weight", "D", "D"), bias: Tensor(f"{name}.bias", "D", "D")}


def _experts(moe: str, gate: str, up: str, down: str) -> dict[str, Tensor]:
    """A router and a tensor for each matrix of each expert, below "model.layers.{layer}." + moe."""
    one = f"{_LAYER}{moe}.experts.{{expert}}"
    return {
        "blocks.router": Tensor(f"{_LAYER}{moe}.gate.weight", "DE", "E D"),
        "blocks.gate": Tensor(f"{one}.{gate}.weight", "DF", "F D"),
        "blocks.up": Tensor(f"{one}.{up}.weight", "DF", "F D"),
        "blocks.down": Tensor(f"{one}.{down}.weight", "FD", "D F"),
    }


MIXTRAL_TENSORS = _experts("block_sparse_moe", "w1", "w3", "w2")
QWEN3_MOE_TENSORS = _experts("mlp", "gate_proj", "up_proj", "down_proj")


# GPT-2 keeps its matrices [in, out].
_GPT2_LAYER = "transformer.h.{layer}."
GPT2_TENSORS: dict[str, Tensor] = {
    "embed.embedding": Tensor("transformer.wte.weight", "VD", "V D"),
    "embed.positions": Tensor("transformer.wpe.weight", "PD", "P D"),
    **_norm("blocks.attn_norm", _GPT2_LAYER + "ln_1"),
    "blocks.q": Tensor(_GPT2_LAYER + "attn.c_attn.weight", "DNH", "D |NH", _QKV, 0),
    "blocks.k": Tensor(_GPT2_LAYER + "attn.c_attn.weight", "DKH", "D |KH", _QKV, 1),
    "blocks.v": Tensor(_GPT2_LAYER + "attn.c_attn.weight", "DKH", "D |KH", _QKV, 2),
    "blocks.q_bias": Tensor(_GPT2_LAYER + "attn.c_attn.bias", "NH", "|NH", _QKV, 0),
    "blocks.k_bias": Tensor(_GPT2_LAYER + "attn.c_attn.bias", "KH", "|KH", _QKV, 1),
    "blocks.v_bias": Tensor(_GPT2_LAYER + "attn.c_attn.bias", "KH", "|KH", _QKV, 2),
    "blocks.o": Tensor(_GPT2_LAYER + "attn.c_proj.weight", "NHD", "NH D"),
    "blocks.o_bias": Tensor(_GPT2_LAYER + "attn.c_proj.bias", "D", "D"),
    **_norm("blocks.mlp_norm", _GPT2_LAYER + "ln_2"),
    "blocks.up": Tensor(_GPT2_LAYER + "mlp.c_fc.weight", "DF", "D F"),
    "blocks.up_bias": Tensor(_GPT2_LAYER + "mlp.c_fc.bias", "F", "F"),
    "blocks.down": Tensor(_GPT2_LAYER + "mlp.c_proj.weight", "FD", "F D"),
    "blocks.down_bias": Tensor(_GPT2_LAYER + "mlp.c_proj.bias", "D", "D"),
    **_norm("final_norm.scale", "transformer.ln_f"),
}

# GPT-NeoX keeps queries, keys and values of one head together.
_NEOX_LAYER = "gpt_neox.layers.{layer}."
_HEAD = ("H", "H", "H")
GPT_NEOX_TENSORS: dict[str, Tensor] = {
    "embed.embedding": Tensor("gpt_neox.embed_in.weight", "VD", "V D"),
    **_norm("blocks.attn_norm", _NEOX_LAYER + "input_layernorm"),
    "blocks.q": Tensor(_NEOX_LAYER + "attention.query_key_value.weight", "DNH", "N|H D", _HEAD, 0),
    "blocks.k": Tensor(_NEOX_LAYER + "attention.query_key_value.weight", "DKH", "K|H D", _HEAD, 1),
    "blocks.v": Tensor(_NEOX_LAYER + "attention.query_key_value.weight", "DKH", "K|H D", _HEAD, 2),
    "blocks.q_bias": Tensor(_NEOX_LAYER + "attention.query_key_value.bias", "NH", "N|H", _HEAD, 0),
    "blocks.k_bias": Tensor(_NEOX_LAYER + "attention.query_key_value.bias", "KH", "K|H", _HEAD, 1),
    "blocks.v_bias": Tensor(_NEOX_LAYER + "attention.query_key_value.bias", "KH", "K|H", _HEAD, 2),
    "blocks.o": Tensor(_NEOX_LAYER + "attention.dense.weight", "NHD", "D NH"),
    "blocks.o_bias": Tensor(_NEOX_LAYER + "attention.dense.bias", "D", "D"),
    **_norm("blocks.mlp_norm", _NEOX_LAYER + "post_attention_layernorm"),
    "blocks.up": Tensor(_NEOX_LAYER + "mlp.dense_h_to_4h.weight", "DF", "F D"),
    "blocks.up_bias": Tensor(_NEOX_LAYER + "mlp.dense_h_to_4h.bias", "F", "F"),
    "blocks.down": Tensor(_NEOX_LAYER + "mlp.dense_4h_to_h.weight", "FD", "D F"),
    "blocks.down_bias": Tensor(_NEOX_LAYER + "mlp.dense_4h_to_h.bias", "D", "D"),
    **_norm("final_norm.scale", "gpt_neox.final_layer_norm"),
    "lm_head.kernel": Tensor("embed_out.weight", "DV", "V D"),
}

GPTJ_TENSORS: dict[str, Tensor] = {
    "embed.embedding": Tensor("transformer.wte.weight", "VD", "V D"),
    **_norm("blocks.attn_norm", _GPT2_LAYER + "ln_1"),
    "blocks.q": Tensor(_GPT2_LAYER + "attn.q_proj.weight", "DNH", "NH D"),
    "blocks.k": Tensor(_GPT2_LAYER + "attn.k_proj.weight", "DKH", "KH D"),
    "blocks.v": Tensor(_GPT2_LAYER + "attn.v_proj.weight", "DKH", "KH D"),
    "blocks.o": Tensor(_GPT2_LAYER + "attn.out_proj.weight", "NHD", "D NH"),
    "blocks.up": Tensor(_GPT2_LAYER + "mlp.fc_in.weight", "DF", "F D"),
    "blocks.up_bias": Tensor(_GPT2_LAYER + "mlp.fc_in.bias", "F", "F"),
    "blocks.down": Tensor(_GPT2_LAYER + "mlp.fc_out.weight", "FD", "D F"),
    "blocks.down_bias": Tensor(_GPT2_LAYER + "mlp.fc_out.bias", "D", "D"),
    **_norm("final_norm.scale", "transformer.ln_f"),
    "lm_head.bias": Tensor("lm_head.bias", "V", "V"),
}
