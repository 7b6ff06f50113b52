"""Gemma Scope (Google DeepMind): params.npz in a folder such as layer_20/width_16k/average_l0_71, JumpReLU, nothing said but by the path."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from sae.dictionary import Dictionary
from sae.errors import SAEError
from sae.formats.arrays import npz_arrays
from sae.formats.common import Layout, checked, make_config, parameters

WEIGHTS = "params.npz"
PLACES = (("-res", "resid_post"), ("-mlp", "mlp_out"), ("-att", "attn_z"))  # in the repository's name -> the tap


def read(folder: Path, dtype: str | None) -> Dictionary:
    """The dictionary in `folder` (or the file). Layer and place are read from its path, where it says them ("gemma-scope-2b-pt-res").

    b_dec is not subtracted from the input. Those of embeddings were trained on rows divided by sqrt(d_in): W_enc and W_dec are scaled for raw
    rows, b_dec is left as it is in the file, both as SAELens does (strictly it would be scaled with W_dec). Transcoders read what enters the
    MLP before the norm's scale, which was folded into the MLP for them (Lieberum et al. 2024, appendix B).
    """
    where = folder / WEIGHTS if folder.is_dir() else folder
    arrays = npz_arrays(where)
    found = {re.sub(r"^w_", "W_", name): array for name, array in arrays.items()}
    scaling = found.pop("scaling_factor", None)
    if scaling is not None and not np.all(np.asarray(scaling) == 1.0):
        raise SAEError(f"{where}: a scaling_factor other than 1 is not supported")
    for name in ("W_enc", "W_dec"):
        if name not in found or found[name].ndim != 2:
            raise SAEError(f"{where}: tensor {name} is missing; found {', '.join(sorted(arrays)) or 'none'}")
    path = where.absolute().as_posix().lower()
    path = path[path.rfind("gemma-scope") :] if "gemma-scope" in path else "/".join(path.split("/")[-4:])
    layers = re.findall(r"layer_(\d+)", path)
    block = f"blocks.{layers[-1]}." if layers else None
    transcodes, embeds = "transcoder" in path, "embedding" in path
    place = next((tap for words, tap in PLACES if words in path), None)
    fields = {
        "architecture": "jumprelu",
        "d_in": found["W_enc"].shape[0],
        "d_sae": found["W_enc"].shape[1],
        "hook_name": "embed" if embeds else block + place if block and place else None,
        "model_name": f"google/gemma-2-{model[1]}" if (model := re.search(r"scope-((?:27b|9b|2b)(?:-it)?)", path)) else None,
        "apply_b_dec_to_input": False,
        "dtype": dtype or "float32",
    }
    if transcodes:
        fields |= {"d_out": found["W_dec"].shape[1], "hook_name": None, "hook_name_out": None}
        if block:
            fields |= {"hook_name": f"{block}mlp_normalized", "hook_name_out": f"{block}mlp_out"}
    cfg = make_config(fields, where)
    scales = {"W_enc": cfg.d_in**-0.5, "W_dec": cfg.d_in**0.5} if embeds else {}
    names = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    return checked(cfg, parameters(cfg, found, names, cfg.dtype, where, scales), where)


GEMMA_SCOPE = Layout(
    holds=WEIGHTS,
    found=lambda path: path.name.endswith(".npz") if path.is_file() else (path / WEIGHTS).exists(),
    read=read,
    hub_files=(WEIGHTS,),
)
