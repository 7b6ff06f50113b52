"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): a matrix W becomes W + (alpha / rank) A B, and only A and B are trained.

An adapter is a plain dict beside the parameters, with the same groups and names: {"blocks": {"q": {"a": [L, in..., r], "b": [L, r, out...]}}}.
`adapt` puts it into the parameters (see `models.adapted`), so that every path that takes parameters (training, sampling, taps) takes an adapted
model, and gradients flow to A and B alone; `merge` makes plain parameters of both. `save_lora` and `load_lora` speak the folder layout of
Hugging Face's PEFT.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.adapted import Adapted, merged
from models.config import ModelConfig
from models.errors import ModelError
from models.families import tensor_of
from models.hf import leaves_of, read_json
from models.hf_export import replacing
from models.tensors import Tensor
from models.transformer import Params, abstract_params, logical_axes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
PARTS = "parts"  # in the weights' metadata: module -> our matrices that lie in its tensor, in the order of their columns, as JSON
_PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which matrices are adapted, and how.

    targets: patterns over the names of parameters ("blocks.q", "blocks.*", "lm_head.*"), as a shell's; "*" passes over norms and biases,
      which have no matrix, and over experts and their router, which are not adapted. rank: columns of A. alpha: the product is scaled by
      alpha / rank, or by alpha / sqrt(rank) where rank_stabilised (Kalajdzievski 2023, arXiv 2312.03732).
    """

    targets: tuple[str, ...] = ("blocks.*",)
    rank: int = 16
    alpha: float = 32.0
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def lora_targets(cfg: ModelConfig, config: LoraConfig) -> list[str]:
    """The names of the adapted parameters, such as "blocks.q". Raises ModelError for a pattern that names none; it tells the nearest."""
    matrices = [name for name, _ in leaves_of(abstract_params(cfg)) if _is_matrix(cfg, name)]
    chosen: list[str] = []
    for pattern in config.targets:
        found = fnmatch.filter(matrices, pattern)
        if not found:
            told = f"LoRA target {pattern!r} names no matrix of this {cfg.family} model"
            raise ModelError(f"{told}; nearest: {', '.join(_nearest(cfg, pattern, matrices))} (all of a block: blocks.*)")
        chosen += found
    if not chosen or config.rank < 1 or not config.alpha > 0:
        given = f"targets={config.targets}, rank={config.rank}, alpha={config.alpha}"
        raise ModelError(f"LoRA needs a target, a rank of at least 1 and an alpha above 0, not {given}")
    return list(dict.fromkeys(chosen))


def _nearest(cfg: ModelConfig, pattern: str, matrices: Sequence[str]) -> list[str]:
    """The three names most like a pattern, which may be what a checkpoint calls them ("q_proj")."""

    def likeness(name: str) -> float:
        module = tensor_of(cfg, name).name.removesuffix(".weight").rpartition(".")[2]
        return max(difflib.SequenceMatcher(None, pattern, known).ratio() for known in (name, name.partition(".")[2], module))

    return sorted(matrices, key=likeness, reverse=True)[:3]


def _is_matrix(cfg: ModelConfig, name: str) -> bool:
    """Whether a parameter may have an adapter: every matrix but the embeddings and, of experts, their own and the router's."""
    apart = name.startswith("embed.") or (cfg.mlp == "experts" and name in ("blocks.router", "blocks.gate", "blocks.up", "blocks.down"))
    return not apart and len(tensor_of(cfg, name).stored.split()) == 2


def _sides(cfg: ModelConfig, name: str) -> tuple[int, bool]:
    """(how many axes of a matrix are inputs, whether layers are stacked in front). Ours lie [in..., out...], however a checkpoint's do."""
    tensor = tensor_of(cfg, name)
    runs = tensor.stored.replace("|", "").split()
    return len(next(run for run in runs if tensor.ours.startswith(run))), "{layer}" in tensor.name


def _shapes(cfg: ModelConfig, name: str, shape: Sequence[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B for a parameter of `shape`."""
    inputs, stacked = _sides(cfg, name)
    head, body = tuple(shape[:stacked]), tuple(shape[stacked:])
    return (*head, *body[:inputs], rank), (*head, rank, *body[inputs:])


def init_lora(cfg: ModelConfig, config: LoraConfig, key: Array) -> Params:
    """A fresh adapter in fp32: A uniform within 1 / sqrt(inputs) on both sides, as PEFT draws it, and B zero, so that nothing changes yet."""
    shapes, lora = dict(leaves_of(abstract_params(cfg))), {}
    targets = lora_targets(cfg, config)
    for name, each in zip(targets, jax.random.split(key, len(targets)), strict=True):
        group, _, leaf = name.partition(".")
        a, b = _shapes(cfg, name, shapes[name].shape, config.rank)
        bound = 1 / math.sqrt(math.prod(a[_sides(cfg, name)[1] : -1]))
        drawn = jax.random.uniform(each, a, jnp.float32, -bound, bound)
        lora.setdefault(group, {})[leaf] = {"a": drawn, "b": jnp.zeros(b, jnp.float32)}
    return lora


def lora_axes(cfg: ModelConfig, config: LoraConfig) -> Params:
    """For each array of an adapter, the tuple of its logical axis names (see `models.sharding.RULES`); the rank is whole everywhere."""
    axes, found = logical_axes(cfg), {}
    for name in lora_targets(cfg, config):
        group, _, leaf = name.partition(".")
        inputs, stacked = _sides(cfg, name)
        head, body = axes[group][leaf][:stacked], axes[group][leaf][stacked:]
        found.setdefault(group, {})[leaf] = {"a": (*head, *body[:inputs], "rank"), "b": (*head, "rank", *body[inputs:])}
    return found


def adapt(params: Params, lora: Params, scale: float) -> Params:
    """The parameters with an `Adapted` leaf wherever the adapter has one: what any path that takes parameters runs as the adapted model.

    params: any dtype; not copied. lora: of `init_lora`. scale: `LoraConfig.scale`.
    """
    adapted = lambda group, leaf, pair: Adapted(params[group][leaf], pair["a"], pair["b"], scale)  # noqa: E731
    return params | {
        group: params[group] | {leaf: adapted(group, leaf, pair) for leaf, pair in leaves.items()} for group, leaves in lora.items()
    }


def adapter_of(params: Params) -> Params:
    """The adapter that `adapt` put into the parameters; empty where there is none."""
    lora: Params = {}
    for name, leaf in leaves_of(params):
        if isinstance(leaf, Adapted):
            group, _, key = name.partition(".")
            lora.setdefault(group, {})[key] = {"a": leaf.a, "b": leaf.b}
    return lora


def merge(params: Params, lora: Params, scale: float) -> Params:
    """The parameters with the adapter added: W + scale A B, computed in fp32, in W's dtype; arguments as of `adapt`. Pure; gradients
    reach both."""
    return merged(adapt(params, lora, scale))


def save_lora(folder: str | os.PathLike, cfg: ModelConfig, lora: Params, config: LoraConfig, base: str = "") -> None:
    """Writes an adapter as PEFT does (adapter_config.json and adapter_model.safetensors). base: the model that it adapts, by name or folder.

    PEFT adapts a tensor as a whole. Where a checkpoint keeps several of our matrices in one (Phi-3's queries, keys and values), theirs has all
    the columns of ours: A's one behind the other, each B's in its own rows, rank and alpha by pattern so that the scale stays. The metadata of
    the safetensors file says under PARTS whose columns they are, so that `load_lora` gives the same adapter back.

    An adapter that is there is replaced as a whole: whenever the writing stops, the folder is the old one or the new one.
    Raises ModelError where the folder cannot be written or holds something else.
    """
    target, tensors, parts = Path(folder).expanduser().absolute(), {}, {}
    if target.exists() and (other := [p for p in ([target] if target.is_file() else target.iterdir()) if p.name not in (CONFIG, WEIGHTS)]):
        raise ModelError(f"{target}: neither empty nor an adapter (it holds {other[0].name}); give another folder")
    for name in (f"{group}.{leaf}" for group, leaves in lora.items() for leaf in leaves):
        parts.setdefault(tensor_of(cfg, name).name, []).append(name)
    for names in parts.values():
        tensor = tensor_of(cfg, names[0])
        for layer, stored in enumerate(tensor.names(cfg).flat):
            sides = [_stored_sides(cfg, name, lora, layer) for name in names]
            module = stored.removesuffix(".weight")
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.concatenate([a for a, _ in sides])
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(np.concatenate([b for _, b in sides], axis=1))
    first = tensor_of(cfg, next(iter(parts.values()))[0])
    by_module = {_module(name): names for name, names in parts.items()}
    ranks, alphas = _patterns(by_module, config.rank, config.alpha, config.rank_stabilised)
    told = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": config.rank_stabilised,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": _transposed(first),  # of the checkpoint's own matrices; A and B lie the same way in any case
        "inference_mode": True,
        "target_modules": list(by_module),
    }
    shared = {_module(name): names for name, names in parts.items() if tensor_of(cfg, names[0]).beside}
    metadata = {"format": "pt"} | ({PARTS: json.dumps(shared)} if shared else {})
    try:
        with replacing(target) as contents:
            save_file(tensors, contents / WEIGHTS, metadata=metadata)
            (contents / CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}") from error


def _module(tensor: str) -> str:
    """What PEFT calls the module of a tensor, in whatever layer: "qkv_proj"."""
    return tensor.removesuffix(".weight").rpartition(".")[2]


def _transposed(tensor: Tensor) -> bool:
    """Whether a checkpoint's matrix lies [in, out]."""
    return tensor.ours.startswith(tensor.stored.split()[0])


def _patterns(modules: Mapping[str, Sequence[str]], rank: int, alpha: float, stabilised: bool) -> tuple[dict[str, int], dict[str, float]]:
    """PEFT's rank_pattern and alpha_pattern of modules that hold several of our matrices: as many ranks, at the scale of one."""
    several = {module: len(names) for module, names in modules.items() if len(names) > 1}
    return {m: n * rank for m, n in several.items()}, {m: alpha * (math.sqrt(n) if stabilised else n) for m, n in several.items()}


def _stored_sides(cfg: ModelConfig, name: str, lora: Params, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """A [rank, in] and B [out of the whole tensor, rank] of one layer of a matrix, as PEFT has them."""
    tensor, (group, _, leaf) = tensor_of(cfg, name), name.partition(".")
    a, b = (np.asarray(lora[group][leaf][side], np.float32) for side in "ab")
    a, b = (a[layer], b[layer]) if _sides(cfg, name)[1] else (a, b)
    rank = b.shape[0]
    if tensor.beside:
        whole = np.zeros(tensor.stored_shape(b.shape), np.float32)
        tensor.write(whole, b)
        return np.ascontiguousarray(a.reshape(-1, rank).T), whole.T if _transposed(tensor) else whole
    return np.ascontiguousarray(a.reshape(-1, rank).T), b.reshape(rank, -1).T


_NEUTRAL: Mapping[str, Any] = {  # fields of a PEFT config that change the result, and the values of them that we have
    "peft_type": "LORA", "bias": "none", "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
    "modules_to_save": None, "lora_bias": False, "layer_replication": None, "alora_invocation_tokens": None,
}  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that take something from the base's matrices, which no file tells


def load_lora(folder: str | os.PathLike, cfg: ModelConfig) -> tuple[Params, LoraConfig]:
    """(adapter, its config) of a PEFT folder.

    Raises ModelError, naming file and field or tensor: a file that is missing or damaged, a kind of adapter that we do not have, a tensor
    of another shape or of no matrix of this model, or a matrix that is adapted in some layers only.
    """
    target = Path(folder)
    told = read_json(target / CONFIG)
    rank, alpha = told.get("r"), told.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1 or not isinstance(alpha, (int, float)) or not alpha > 0:
        raise ModelError(f"{target / CONFIG}: r must be a whole number of at least 1 and lora_alpha above 0, not {rank!r} and {alpha!r}")
    try:
        with safe_open(target / WEIGHTS, "np") as file:
            metadata, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        modules = dict(json.loads(metadata.get(PARTS, "{}")))
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ModelError(f"{target / WEIGHTS}: not a complete safetensors file ({error})") from error
    ranks, alphas = _patterns(modules, rank, float(alpha), bool(told.get("use_rslora", False)))
    for field, neutral in (_NEUTRAL | {"rank_pattern": ranks, "alpha_pattern": alphas}).items():
        if told.get(field, neutral) not in (neutral, None):
            raise ModelError(f"{target / CONFIG}: {field}={told[field]!r} is not supported; known: {neutral!r}")
    if str(begun := told.get("init_lora_weights")).startswith(_CHANGES_BASE):
        fix = "its base is not the model itself; convert it with PEFT (save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        raise ModelError(f"{target / CONFIG}: init_lora_weights={begun!r} is not supported: {fix}")
    lora, shapes = {}, dict(leaves_of(abstract_params(cfg)))
    used: set[str] = set()
    for name, abstract in shapes.items():
        if not _is_matrix(cfg, name):
            continue
        tensor = tensor_of(cfg, name)
        beside = modules.get(_module(tensor.name), [name]) if tensor.beside else [name]  # PEFT's own has one A for all that lie there
        stored = [each.removesuffix(".weight") for each in tensor.names(cfg).flat]
        keys = {side: [f"{_PREFIX}{module}.lora_{side.upper()}.weight" for module in stored] for side in "ab"}
        missing = [key for both in keys.values() for key in both if key not in tensors]
        if name not in beside or len(missing) == 2 * len(stored):
            continue
        if missing:
            raise ModelError(f"{target / WEIGHTS}: missing tensor {missing[0]}: a matrix is adapted in every layer or in none")
        group, _, leaf = name.partition(".")
        both, columns = {}, slice(beside.index(name) * rank, (beside.index(name) + 1) * rank)
        for side, shape in zip("ab", _shapes(cfg, name, abstract.shape, rank), strict=True):
            one, found = shape[_sides(cfg, name)[1] :], []
            whole = tensor.stored_shape(one) if side == "b" and tensor.beside else (math.prod(one[1:]), rank)
            out = whole[_transposed(tensor)] if side == "b" and tensor.beside else whole[0]
            flat = (rank * len(beside), math.prod(one[:-1])) if side == "a" else (out, rank * len(beside))
            for key in keys[side]:
                used.add(key)
                if tensors[key].shape != flat:
                    raise ModelError(f"{target / WEIGHTS}: {key}: expected shape {list(flat)}, found {list(tensors[key].shape)}")
                part = tensors[key].astype(np.float32)
                part = part[columns] if side == "a" else part[:, columns]
                if side == "b" and tensor.beside:
                    laid = part.T if _transposed(tensor) else part
                    found.append(tensor.read(laid.__getitem__, one, [slice(None)] * len(one)))
                else:
                    found.append(part.T.reshape(one))
            both[side] = jnp.asarray(np.stack(found).reshape(shape))
        lora.setdefault(group, {})[leaf] = both
    tensors = {key: value for key, value in tensors.items() if key not in used}
    if tensors:
        raise ModelError(f"{target / WEIGHTS}: unexpected tensor {min(tensors)}: no matrix of this {cfg.family} model")
    if not lora:
        raise ModelError(f"{target / WEIGHTS}: holds no adapter")
    targets = tuple(f"{group}.{leaf}" for group, leaves in lora.items() for leaf in leaves)
    return lora, LoraConfig(targets, rank, float(alpha), bool(told.get("use_rslora", False)))
