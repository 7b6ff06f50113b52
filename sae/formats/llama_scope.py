"""Llama Scope and llamascopium (OpenMOSS's Language-Model-SAEs).

Two layouts: hyperparams.json with checkpoints/final.safetensors (the first release of Llama Scope), and config.json with
sae_weights.safetensors. Sparsity is decided by pre-activation times decoder norm (`sparsity_include_decoder_norm`), so norms are folded
into the encoder and thresholds stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sae.dictionary import Dictionary, norm_scales
from sae.errors import SAEError
from sae.formats.arrays import Arrays, safetensors_arrays
from sae.formats.common import Layout, checked, file_norms, from_transformer_lens, make_config, maybe_object, needed, parameters, read_object, refuse

OLD, NEW = "hyperparams.json", "config.json"
OLD_WEIGHTS, NEW_WEIGHTS = "checkpoints/final.safetensors", "sae_weights.safetensors"
NORMS = {"dataset-wise": "expected_average_only_in", "token-wise": "constant_norm_rescale", "inference": "none"}
NORM_OF = "dataset_average_activation_norm"
SIDES = {  # ours -> (its name as a Linear of the model's, as a plain parameter)
    "W_enc": (("encoder.weight", "T"), "W_E"),
    "b_enc": ("encoder.bias", "b_E"),
    "W_dec": (("decoder.weight", "T"), "W_D"),
    "b_dec": ("decoder.bias", "b_D"),
}
THRESHOLDS = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")


def read(folder: Path, dtype: str | None) -> Dictionary:
    """The dictionary in `folder`."""
    old = (folder / OLD).exists()
    where = folder / (OLD if old else NEW)
    config = read_object(where)
    arrays = safetensors_arrays(folder / (OLD_WEIGHTS if old else NEW_WEIGHTS))
    refuse(config, where, use_glu_encoder=False, sae_type="sae")
    act = str(config.get("act_fn", "relu")).lower()
    if act not in ("relu", "jumprelu", "topk"):
        raise SAEError(f"{where}: act_fn is {act!r}; 'relu', 'jumprelu' and 'topk' are supported: turn a batchtopk SAE into a jumprelu one first")
    d_in = needed(config, "d_model", where)
    d_sae = config.get("d_sae") or d_in * int(needed(config, "expansion_factor", where))
    hook_in = needed(config, "hook_point_in", where)
    hook_out = config.get("hook_point_out") or hook_in
    norm = config.get("norm_activation", "dataset-wise")
    if norm not in NORMS:
        raise SAEError(f"{where}: norm_activation is {norm!r}; known: {', '.join(NORMS)}")
    fields: dict[str, Any] = {
        "architecture": act,
        "d_in": d_in,
        "d_sae": d_sae,
        "k": needed(config, "top_k", where) if act == "topk" else None,
        "normalize_activations": NORMS[norm],
        "apply_b_dec_to_input": bool(config.get("apply_decoder_bias_to_pre_encoder", False)),
        "hook_name": from_transformer_lens(hook_in),
        "model_name": config.get("model_name"),
        "dtype": dtype or stored_dtype(arrays),
    }
    if norm == "dataset-wise":
        fields["input_scale"] = scale(config, arrays, hook_in, "in", d_in, where)
    if hook_out != hook_in:
        fields |= {"d_out": d_in, "hook_name_out": from_transformer_lens(hook_out)}
        if norm == "dataset-wise":
            fields["output_scale"] = scale(config, arrays, hook_out, "out", d_in, where)
    cfg = make_config(fields, where)
    names: dict[str, Any] = {}
    for ours, (linear, plain) in SIDES.items():
        names[ours] = plain if plain in arrays else linear
    if not config.get("use_decoder_bias", True):
        names["b_dec"] = 0.0
    if act == "jumprelu":
        names["threshold"] = 0.0
    scales = {}
    if config.get("sparsity_include_decoder_norm", True):
        name, turned = (names["W_dec"], False) if isinstance(names["W_dec"], str) else (names["W_dec"][0], True)
        shape = (cfg.out, cfg.d_sae) if turned else (cfg.d_sae, cfg.out)
        if name in arrays and tuple(arrays[name].shape) == shape:  # else `parameters` names what is wrong
            norms = file_norms(arrays[name], turned)
            scales = norm_scales(cfg, norms) if (abs(norms - 1) > 1e-3).any() else {}
    d = checked(cfg, parameters(cfg, arrays, names, cfg.dtype, where, scales), where)
    if act == "jumprelu":
        d = d.replace(params=d.params | {"threshold": thresholds(config, arrays, cfg, where).astype(d.params["b_enc"].dtype)})
        checked(cfg, d.params, where)
    return d


def stored_dtype(arrays: Arrays) -> str:
    """The dtype of the largest tensor in the file."""
    name = str(max(arrays.values(), key=lambda a: a.nbytes).dtype) if arrays else "float32"
    return name if name in ("bfloat16", "float16") else "float32"


def scale(config: dict[str, Any], arrays: Arrays, hook: str, side: str, width: int, where: Path) -> float:
    """sqrt(width) over the mean norm of the activations at a hook, from the config ("in", "out") or the weights (by the hook's name)."""
    norm = (config.get(NORM_OF) or {}).get(side)
    stored = arrays.get(f"{NORM_OF}.{hook}")
    norm = float(np.asarray(stored, np.float32).reshape(-1)[0]) if stored is not None else norm
    if not isinstance(norm, (int, float)) or not 0 < norm < float("inf"):
        raise SAEError(f"{where}: norm_activation is 'dataset-wise', but {NORM_OF} says nothing of {side} ({hook}); found {norm!r}")
    return width**0.5 / norm


def thresholds(config: dict[str, Any], arrays: Arrays, cfg: Any, where: Path) -> np.ndarray:
    """[F] thresholds: each latent's own, or the one number of the first release.

    That number is of pre-activations on raw rows (the weights as that library standardises them for use), so it grows with the input's
    scale; SAELens reads it so too. Whether it fits shows in L0, which is about 50 on the data it was trained on.
    """
    for name in THRESHOLDS:
        if name in arrays:
            return np.exp(np.asarray(arrays[name], np.float32))
    if config.get("jump_relu_threshold") is None:
        raise SAEError(f"{where}: jump_relu_threshold is missing, and the weights hold no {THRESHOLDS[0]}")
    raised = cfg.input_scale if (where.name == OLD) else 1.0
    return np.full(cfg.d_sae, float(config["jump_relu_threshold"]) * raised, np.float32)


def is_new(path: Path) -> bool:
    """Whether a folder has the config.json of this library."""
    config = maybe_object(path / NEW)
    return "hook_point_in" in config or config.get("sae_type") in ("sae", "crosscoder", "lorsa", "clt", "mixcoder")


LLAMA_SCOPE = Layout(
    holds=f"{OLD} and {OLD_WEIGHTS}", found=lambda path: (path / OLD).exists(), read=read, hub_files=(OLD, OLD_WEIGHTS)
)
LLAMASCOPIUM = Layout(holds=f"{NEW} (with hook_point_in) and {NEW_WEIGHTS}", found=is_new, read=read, hub_files=(NEW, NEW_WEIGHTS))
