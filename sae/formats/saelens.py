"""SAELens: cfg.json and sae_weights.safetensors, version 6 (metadata nested) or older (flat)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sae.architectures import ARCHITECTURES
from sae.dictionary import Dictionary, fold_input_scale, norm_scales, param_shapes
from sae.errors import SAEError
from sae.formats.arrays import safetensors_arrays
from sae.formats.common import (
    Layout,
    checked,
    converted,
    dtype_of,
    file_norms,
    from_transformer_lens,
    make_config,
    needed,
    read_object,
    to_transformer_lens,
)

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.0.0"  # the first release that writes this layout of cfg.json
SCALER, SCALE = "activation_scaler.json", "scaling_factor"  # where one of its checkpoints keeps the scale of its inputs
KINDS = {"standard": "relu", "topk": "topk", "gated": "gated", "jumprelu": "jumprelu"}  # its architecture -> ours
TRANSCODERS = {  # -> (ours, whether it skips)
    "transcoder": ("relu", False),
    "skip_transcoder": ("relu", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}


def read(folder: Path, dtype: str | None) -> Dictionary:
    """The dictionary in `folder`."""
    where = folder / CONFIG
    config = read_object(where)
    if (folder / SCALER).exists():
        config |= read_object(folder / SCALER)
    flat = config.get("metadata") or config
    kind, k, skip = config.get("architecture", "standard"), config.get("k"), False
    act = config.get("activation_fn_str", config.get("activation_fn")) or "relu"  # before version 6
    if act not in ("relu", "topk"):  # SAELens 6 passes over it
        raise SAEError(f"{where}: activation_fn_str is {act!r}; 'relu' and 'topk' are supported")
    if act == "topk":
        kind, k = "topk", (config.get("activation_fn_kwargs") or {}).get("k")
    transcodes = kind in TRANSCODERS
    if transcodes:
        ours, skip = TRANSCODERS[kind]
    elif kind in KINDS:
        ours = KINDS[kind]
    else:
        raise SAEError(f"{where}: unknown architecture {kind!r}; known: {', '.join((*KINDS, *TRANSCODERS))}")
    if config.get("reshape_activations", "none") not in ("none", "hook_z"):  # rows of "hook_z" are given flat here
        raise SAEError(f"{where}: reshape_activations is {config['reshape_activations']!r}; 'none' and 'hook_z' are supported")
    head = flat.get("hook_head_index", flat.get("hook_point_head_index"))
    if head is not None:
        raise SAEError(f"{where}: hook_head_index is {head!r}: an SAE of one attention head; only those of whole activations are supported")
    norm = config.get("normalize_activations") or "none"
    if norm is True:
        norm = "expected_average_only_in"
    fields = {
        "architecture": ours,
        "d_in": config.get("d_in"),
        "d_sae": config.get("d_sae"),
        "k": k if ARCHITECTURES[ours].needs_k else None,
        "normalize_activations": norm,
        "input_scale": 1.0 if norm != "expected_average_only_in" else input_scale(config, where),
        "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", not transcodes)),
        "hook_name": from_transformer_lens(flat.get("hook_name", flat.get("hook_point"))),
        "model_name": flat.get("model_name"),
        "context_size": flat.get("context_size"),
        "dtype": dtype or dtype_of(config.get("dtype")),
    }
    if transcodes:
        fields |= {"d_out": needed(config, "d_out", where), "skip": skip, "hook_name_out": from_transformer_lens(flat.get("hook_name_out"))}
    cfg = make_config(fields, where)
    arrays = safetensors_arrays(folder / WEIGHTS)
    scaling = arrays.pop("scaling_factor", None)
    if scaling is not None and not np.all(np.asarray(scaling, np.float32) == 1.0):
        raise SAEError(f"{where}: a scaling_factor other than 1 is not supported")
    shapes = param_shapes(cfg)
    sound = {n for n, a in arrays.items() if n in shapes and tuple(a.shape) == shapes[n]}  # `checked` names the others
    folds = config.get("rescale_acts_by_decoder_norm") and "W_dec" in sound
    scales = norm_scales(cfg, file_norms(arrays["W_dec"])) if folds else {}
    params: dict[str, Any] = {}
    for name, array in arrays.items():
        scale = scales.get(name) if name in sound else None
        params[name] = converted(array, cfg.dtype, transpose=name == "W_skip", scale=scale) if name in shapes else array
    return checked(cfg, params, where)


def input_scale(config: dict[str, Any], where: Path) -> float:
    """The scale of "expected_average_only_in", which cfg.json lacks.

    SAELens folds it into the weights at the end of training and then writes "none" (`SAETrainer.fit`), so a file with this setting
    holds unfolded weights: of one of its checkpoints, whose scale lies beside it in SCALER, or of a release whose scale is in a table
    of its own. Where it finds neither it warns and multiplies by 1 (`SAE.from_pretrained`): other latents than those trained.
    """
    scale = config.get(SCALE)
    if isinstance(scale, (int, float)) and not isinstance(scale, bool) and 0 < scale < float("inf"):
        return float(scale)
    found = "is not there" if SCALE not in config else f"holds {SCALE} {scale!r}"
    raise SAEError(
        f"{where}: normalize_activations is 'expected_average_only_in', but the scale of the inputs, {SCALER} beside it, {found}: put "
        f'{{"{SCALE}": S}} there, S = sqrt(d_in) / (mean norm of the activations it was trained on), or 1 if the weights take raw ones'
    )


def write(d: Dictionary) -> dict[str, dict[str, Any]]:
    """SAELens 6: the input scale is folded into the weights, as that library does when it saves."""
    d = fold_input_scale(d)
    cfg, name = d.cfg, saelens_name(d)
    config = {
        "architecture": name,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": cfg.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": cfg.normalize_activations,
        "reshape_activations": "hook_z" if (cfg.hook_name or "").endswith(".attn_z") else "none",
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": cfg.model_name,
            "hook_name": to_transformer_lens(cfg.hook_name),
            "hook_head_index": None,
            "context_size": cfg.context_size,
            "prepend_bos": True,
            "seqpos_slice": [None],
            "model_from_pretrained_kwargs": {},
        },
    }
    if ARCHITECTURES[cfg.architecture].needs_k:
        config |= {"k": cfg.k, "rescale_acts_by_decoder_norm": False}
    if cfg.d_out is not None:
        config["d_out"] = cfg.d_out
        config["metadata"]["hook_name_out"] = to_transformer_lens(cfg.hook_name_out)
    params = dict(d.params)
    if cfg.skip:
        params["W_skip"] = jnp.transpose(params["W_skip"])
    return {WEIGHTS: params, CONFIG: config}


def saelens_name(d: Dictionary) -> str:
    """SAELens's name of the architecture. Raises SAEError where it has none."""
    cfg = d.cfg
    if not cfg.undo_normalization or cfg.normalize_activations == "layer_norm_eps":
        raise SAEError("sae.save: SAELens normalises rows otherwise (it undoes what it does, without the constant); choose layout='native'")
    if cfg.d_out is not None:
        for name, what in TRANSCODERS.items():
            if what == (cfg.architecture, cfg.skip):
                return name
    elif cfg.architecture in KINDS.values():
        return next(theirs for theirs, ours in KINDS.items() if ours == cfg.architecture)
    kind = f"{cfg.architecture}{' skip' if cfg.skip else ''}{' transcoder' if cfg.d_out is not None else ''}"
    raise SAEError(f"sae.save: SAELens has no {kind}; choose layout='native'")


SAELENS = Layout(
    holds=f"{CONFIG} and {WEIGHTS}",
    found=lambda path: (path / CONFIG).exists() and not (path / "sae.safetensors").exists(),
    read=read,
    hub_files=(CONFIG, WEIGHTS, SCALER),
    write=write,
)
