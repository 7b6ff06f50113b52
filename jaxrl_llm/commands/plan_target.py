"""What `plan` is asked about: the sizes of a config, its own or another run's, and the shape of a model without its weights."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jaxrl_llm.config import field_names, load_config
from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.runtime import parse_axes
from jaxrl_llm.train.checks import check_lora
from jaxrl_llm.train.config import LoraSettings, LossConfig, PreferenceLossConfig, from_mapping

_QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768, "eos_token_id": 151645}
_QWEN_05 = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}
_QWEN_15 = {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960}
_QWEN_7 = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944}
_QWEN_MOE = _QWEN | {"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128}
_QWEN_MOE |= {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
_MIXTRAL = {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_MIXTRAL |= {"num_key_value_heads": 8, "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2}
_LLAMA_8 = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
_LLAMA_8 |= {"intermediate_size": 14336, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": False}
_LLAMA_31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
_TIED = {"vocab_size": 151936, "tie_word_embeddings": True}
_UNTIED = {"vocab_size": 152064, "tie_word_embeddings": False}
_MATH = {"max_position_embeddings": 4096, "rope_theta": 1e4}

# Published shapes, so that a plan needs no network: the config.json of each checkpoint, as far as it shapes a program.
PRESETS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {**_QWEN, **_QWEN_05, **_TIED},
    "qwen2.5-1.5b": {**_QWEN, **_QWEN_15, **_TIED},
    "qwen2.5-7b": {**_QWEN, **_QWEN_7, **_UNTIED},
    "qwen3-30b-a3b": {**_QWEN_MOE, "vocab_size": 151936, "tie_word_embeddings": False, "max_position_embeddings": 40960},
    "mixtral-8x7b": {**_MIXTRAL, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "eos_token_id": 2},
    "qwen2.5-math-1.5b": {**_QWEN, **_QWEN_15, **_TIED, **_MATH},
    "qwen2.5-math-7b": {**_QWEN, **_QWEN_7, **_UNTIED, **_MATH},
    "deepseek-r1-distill-qwen-7b": {**_QWEN, **_QWEN_7, **_UNTIED, **_MATH, "max_position_embeddings": 131072, "eos_token_id": 151643},
    "llama-3.1-tulu-3-8b-sft": {**_LLAMA_8, "vocab_size": 128264, "rope_scaling": _LLAMA_31, "eos_token_id": 128001},
}

# What a size is where neither the command line nor a target gives it; "" is fitted to the devices.
DEFAULTS: dict[str, Any] = {
    "dtype": "bfloat16",
    "layout": "",
    "target_layout": "",
    "rollout_layout": "",
    "target_rollout_layout": "",
    "prompts": 16,
    "num_samples": 8,
    "prompt_tokens": 256,
    "max_new_tokens": 512,
    "rollout_rows": 512,
    "rollout_refill": False,
    "micro_batch_rows": 0,
    "samples_together": 0,
    "inner_epochs": 1,
    "updates_per_epoch": 1,
    "lora_rank": 0,
    "remat": True,
    "remat_keep": "nothing",
    "attention": "plain",
}

# Our field -> the names it goes by in the configs of runs, most telling first; a path matches where it ends in one of them.
NAMES: dict[str, tuple[str, ...]] = {
    "model": ("policy.model", "model.path", "model.source", "model", "policy"),
    "dtype": ("policy.dtype", "model.dtype", "dtype"),
    "target_layout": ("mesh",),
    "target_rollout_layout": ("rollout_mesh",),
    "prompts": ("grpo.prompts_per_step", "prompts_per_step", "batch_prompts", "batch_rows", "batch_size"),
    "num_samples": ("grpo.num_samples", "num_samples"),
    "prompt_tokens": ("grpo.max_prompt_tokens", "max_prompt_tokens", "prompt_tokens"),
    "max_new_tokens": ("grpo.max_new_tokens", "max_new_tokens"),
    "rollout_rows": ("grpo.rollout_rows", "rollout_rows"),
    "rollout_refill": ("rollout_refill",),
    "micro_batch_rows": ("grpo.micro_batch_rows", "micro_batch_rows"),
    "samples_together": ("samples_together",),
    "inner_epochs": ("inner_epochs",),
    "updates_per_epoch": ("updates_per_epoch",),
    "lora_rank": ("lora.rank",),
    "remat": ("grpo.remat", "remat"),
    "remat_keep": ("remat_keep",),
    "attention": ("attention",),
}


def target_sizes(config: Any) -> dict[str, Any]:
    """The fields of configs/plan.py: as given, else the target config's, else `DEFAULTS`; the target's mesh as target_layout; its
    `LossConfig` or `PreferenceLossConfig`, for a KL term and a critic take memory, as loss; its `LoraSettings`, as lora; whether it samples,
    as sampled; whether the policy that training starts from stays in memory, as keeps_start; the settings of the sparse autoencoder that it
    trains, or None, as sae; and of supervised training whether its rows are packed, and the weight of its experts' balance, as texts.

    Raises:
      UserError: neither names a model, or the target has no step that is planned here.
    """
    given = {name: config[name] for name in config if config[name] is not None}
    target = load_config(config.target) if config.target else ConfigDict()
    paths = field_names(target)
    sizes = DEFAULTS | _step(config.target, target, paths) | given
    for ours, names in NAMES.items():
        value = _first(target, paths, names)
        if value not in (None, "") and type(value) is type(sizes[ours]) and given.get(ours, "") == "":
            sizes[ours] = value
    sizes["lora"] = dataclasses.replace(sizes["lora"], rank=sizes["lora_rank"])
    check_lora(sizes["lora"])
    if not sizes["model"]:
        whose = f"{config.target} names no model to load" if config.target else "no model"
        raise UserError(f"{whose}: give --config.model=..., a preset ({', '.join(PRESETS)}), a folder or a hub id")
    return sizes


def _step(name: str, target: ConfigDict, paths: list[str]) -> dict[str, Any]:
    """The loss of a target's step, whether the policy samples what it is trained on, and where it does not, widths."""
    sampled = any(path.rpartition(".")[2] == "num_samples" for path in paths)
    texts = {"packed": target.pack, "router_balance": target.train.router_balance} if "loss_on" in target else None
    if paths and not sampled and texts is None and "train.loss.kind" not in paths:
        raise UserError(
            f"{name} has no step that plan knows: give a config of sft, dpo, grpo, online_dpo, saerl, story_rules or verif, or a model and sizes"
        )
    groups = [group for group in map(target.get, ("train", "grpo")) if isinstance(group, ConfigDict)]
    found, lora = (next((group[name] for group in groups if name in group), {}) for name in ("loss", "lora"))
    loss = from_mapping(PreferenceLossConfig if "kind" in found else LossConfig, found, "loss.")
    # Prompts and completions are padded each to their own longest: half of a row's room is a guess that the command line may better. Of texts
    # the row alone counts.
    half = max(target.max_length // 2, 1) if paths and not sampled else 0
    widths = {"prompt_tokens": half, "max_new_tokens": max(target.max_length - half, 1) if texts else half} if half else {}
    # Pairs that are given need sums of their reference only; arms share the policy they start from, and stories are judged by it.
    reference = sampled and loss.needs_reference if isinstance(loss, PreferenceLossConfig) else bool(loss.kl)
    keeps_start = reference or "arm_table" in target or "stories" in target
    settings = from_mapping(LoraSettings, lora, "lora.")
    # SAERL trains a sparse autoencoder of its own, unless one is given.
    trained = target.sae.to_dict() if {"arm_table", "sae"} <= set(target) and not target.sae.path else None
    found = {"loss": loss, "lora": settings, "sampled": sampled or not paths, "keeps_start": keeps_start, "sae": trained, "texts": texts}
    return found | widths


def choose_layout(sizes: Mapping[str, Any], devices: int) -> str:
    """The mesh to plan for: the layout given, else the target's where it is of so many devices, else one that fits them.

    Fitted is fsdp over as many devices as a step has prompts, since a prompt's samples stay together; tensor takes the others.
    """
    if sizes["layout"]:
        return sizes["layout"]
    target = parse_axes(sizes["target_layout"]) if sizes["target_layout"] else {}
    if target and (-1 in target.values() or math.prod(target.values()) == devices):
        return sizes["target_layout"]
    tensor = 1
    while devices % (2 * tensor) == 0 and devices // tensor > sizes["prompts"]:
        tensor *= 2
    return f"fsdp={devices // tensor},tensor={tensor}"


def choose_rollout_layout(sizes: Mapping[str, Any], devices: int) -> str:
    """The mesh to sample on: the one given, else the target's where it is of so many devices, else "" (that of the training)."""
    if sizes["rollout_layout"] or not sizes["target_rollout_layout"]:
        return sizes["rollout_layout"]
    axes = parse_axes(sizes["target_rollout_layout"])
    return sizes["target_rollout_layout"] if -1 in axes.values() or math.prod(axes.values()) == devices else ""


def _first(target: ConfigDict, paths: list[str], names: tuple[str, ...]) -> Any:
    for name in names:
        for path in paths:
            if path == name or path.endswith("." + name):
                value: Any = target
                for part in path.split("."):
                    value = value.get(part)
                return value
    return None


def resolve_model(name: str, dtype: str) -> Any:
    """The ModelConfig of a preset, of a folder's config.json, or of a hub id's (only config.json is fetched).

    Raises:
      UserError: no such preset or folder; models.errors.ModelError: no config.json there, or none of a known architecture.
    """
    import dataclasses

    from models import ModelConfig, hub
    from models.errors import ModelError
    from models.hf import read_config

    preset = name.rsplit("/", 1)[-1].lower()
    if Path(name).is_dir() or preset not in PRESETS:
        try:
            folder = hub.resolve(name, ("config.json",))
        except ModelError as error:
            raise UserError(f"no preset, folder or hub id '{name}': {nearest(preset, PRESETS)}") from error
        return dataclasses.replace(read_config(folder), dtype=dtype)
    return dataclasses.replace(ModelConfig.from_hf(PRESETS[preset]), dtype=dtype)
