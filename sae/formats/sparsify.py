"""EleutherAI's sparsify: cfg.json and sae.safetensors in a folder named after the module, such as "layers.5"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sae.dictionary import Dictionary, fold_input_scale
from sae.errors import SAEError
from sae.formats.arrays import safetensors_arrays
from sae.formats.common import Layout, checked, from_module_path, make_config, maybe_object, parameters, read_object, refuse

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
NAMES = {"W_enc": ("encoder.weight", "T"), "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def read(folder: Path, dtype: str | None) -> Dictionary:
    """The dictionary in `folder`; the folder above may say the model's name. A transcoder here has outputs of its inputs' width."""
    where = folder / CONFIG
    config = read_object(where)
    refuse(config, where, activation="topk", signed=False)
    arrays = safetensors_arrays(folder / WEIGHTS)
    d_in = config.get("d_in")
    transcodes, skip = bool(config.get("transcode")), bool(config.get("skip_connection"))
    latents = config.get("num_latents") or (isinstance(d_in, int) and d_in * (config.get("expansion_factor") or 0)) or None
    stored = str(arrays["W_dec"].dtype) if "W_dec" in arrays else "float32"
    fields = {
        "architecture": "topk",
        "d_in": d_in,
        "d_sae": latents,
        "k": config.get("k"),
        "hook_name": from_module_path(folder.name),
        "model_name": maybe_object(folder.parent / "config.json").get("model"),
        "context_size": maybe_object(folder.parent / "config.json").get("ctx_len"),
        "dtype": dtype or (stored if stored in ("bfloat16", "float16") else "float32"),
    }
    if skip and not transcodes:
        raise SAEError(f"{where}: skip_connection without transcode: an autoencoder that copies its input; only transcoders may skip")
    if transcodes:
        fields |= {"d_out": d_in, "skip": skip, "hook_name_out": fields["hook_name"], "hook_name": from_module_path(folder.name, entering=True)}
    cfg = make_config(fields, where)
    names = NAMES | ({"W_skip": ("W_skip", "T")} if skip else {})
    return checked(cfg, parameters(cfg, arrays, names, cfg.dtype, where), where)


def write(d: Dictionary) -> dict[str, dict[str, Any]]:
    """TopK dictionaries only; the input scale is folded in."""
    d = fold_input_scale(d)
    cfg, transcodes = d.cfg, d.cfg.d_out is not None
    fits = cfg.architecture == "topk" and cfg.normalize_activations == "none" and cfg.apply_b_dec_to_input != transcodes
    if not fits or cfg.d_out not in (None, cfg.d_in):
        raise SAEError(
            "sae.save: sparsify has TopK dictionaries of raw activations, with apply_b_dec_to_input (or transcoders as wide as their input) "
            f"only; this one has architecture {cfg.architecture!r}, normalize_activations {cfg.normalize_activations!r}, "
            f"apply_b_dec_to_input {cfg.apply_b_dec_to_input}, d_out {cfg.d_out}: choose layout='native'"
        )
    config = {
        "activation": "topk",
        "expansion_factor": max(1, cfg.d_sae // cfg.d_in),
        "normalize_decoder": True,
        "num_latents": cfg.d_sae,
        "k": cfg.k,
        "multi_topk": False,
        "skip_connection": cfg.skip,
        "transcode": transcodes,
        "d_in": cfg.d_in,
    }
    params = {"W_dec": d.params["W_dec"], "b_dec": d.params["b_dec"], "encoder.bias": d.params["b_enc"]}
    params["encoder.weight"] = jnp.transpose(d.params["W_enc"])
    if cfg.skip:
        params["W_skip"] = jnp.transpose(d.params["W_skip"])
    return {WEIGHTS: params, CONFIG: config}


SPARSIFY = Layout(
    holds=f"{CONFIG} and {WEIGHTS}",
    found=lambda path: (path / CONFIG).exists() and (path / WEIGHTS).exists(),
    read=read,
    hub_files=(CONFIG, WEIGHTS),
    write=write,
)
