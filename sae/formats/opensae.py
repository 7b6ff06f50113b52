"""OpenSAE (THU-KEG): a transformers-style folder, config.json and safetensors in shards.

It reads rows less their mean over their standard deviation. Without `normalize_shift_back` (the released ones) it writes raw activations all
the same, with one b_dec subtracted from the normalised input and added to the raw output; that is kept as it was trained.
"""

from __future__ import annotations

from pathlib import Path

from sae.dictionary import LAYER_NORM_EPS, Dictionary
from sae.errors import SAEError
from sae.formats.arrays import safetensors_arrays, sharded_arrays
from sae.formats.common import Layout, checked, dtype_of, from_module_path, make_config, maybe_object, needed, parameters, read_object

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


def read(folder: Path, dtype: str | None) -> Dictionary:
    """The dictionary in `folder`. Its JumpReLU lowers the threshold for a batch in which nothing fires; here it stays."""
    where = folder / "config.json"
    config = read_object(where)
    arrays = sharded_arrays(folder / INDEX) if (folder / INDEX).exists() else safetensors_arrays(folder / WEIGHTS)
    activation = config.get("activation", "topk")
    if activation not in ("topk", "jumprelu"):
        raise SAEError(f"{where}: activation is {activation!r}; 'topk' and 'jumprelu' are supported")
    normal = bool(config.get("input_normalize", True))
    eps = config.get("input_normalize_eps", LAYER_NORM_EPS)
    if normal and abs(eps - LAYER_NORM_EPS) > 1e-12:
        raise SAEError(f"{where}: input_normalize_eps is {eps}; only {LAYER_NORM_EPS} is supported")
    if config.get("input_hookpoint") != config.get("output_hookpoint"):
        raise SAEError(f"{where}: output_hookpoint is {config.get('output_hookpoint')!r}, not its input's; this layout knows no transcoders")
    fields = {
        "architecture": activation,
        "d_in": needed(config, "hidden_size", where),
        "d_sae": needed(config, "feature_size", where),
        "k": config.get("k") if activation == "topk" else None,
        "normalize_activations": "layer_norm_eps" if normal else "none",
        "undo_normalization": bool(config.get("normalize_shift_back")) or not normal,
        "hook_name": from_module_path(config.get("input_hookpoint")),
        "model_name": config.get("model_name"),
        "dtype": dtype or dtype_of(config.get("torch_dtype", config.get("dtype"))),
    }
    cfg = make_config(fields, where)
    names: dict = {"W_enc": ("encoder.weight", "T"), "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
    if activation == "jumprelu":
        names["threshold"] = float(needed(config, "jumprelu_theta", where))
    return checked(cfg, parameters(cfg, arrays, names, cfg.dtype, where), where)


OPENSAE = Layout(
    holds="config.json with architectures ['OpenSae'] and model.safetensors (in shards, with an index)",
    found=lambda path: "OpenSae" in (maybe_object(path / "config.json").get("architectures") or []),
    read=read,
    hub_files=("config.json", INDEX, "model*.safetensors"),
)
