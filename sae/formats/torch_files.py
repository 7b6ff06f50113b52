"""Layouts that are files of torch.save: dictionary_learning, Qwen-Scope, OpenAI's sparse_autoencoder. PyTorch is not needed to read them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from sae.dictionary import Dictionary
from sae.errors import SAEError
from sae.formats.arrays import state_dict
from sae.formats.common import Layout, checked, make_config, maybe_object, needed, parameters, read_object

DICT_CLASSES = {  # of dictionary_learning -> (our architecture, whether b_dec is subtracted from the input)
    "AutoEncoder": ("relu", True),
    "AutoEncoderNew": ("relu", False),
    "AutoEncoderTopK": ("topk", True),
    "GatedAutoEncoder": ("gated", True),
    "BatchTopKSAE": ("jumprelu", True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", True),
    "JumpReluAutoEncoder": ("jumprelu", False),
}
PLACES = {"resid_post": "resid_post", "residual": "resid_post", "resid_pre": "resid_pre", "mlp_out": "mlp_out", "attention_out": "attn_out"}


def first(arrays: dict[str, Any], where: Path, *names: Any) -> Any:
    """The first of `names` (each a name, or (name, "T")) that the file has."""
    for name in names:
        if (name[0] if isinstance(name, tuple) else name) in arrays:
            return name
    plain = " or ".join(n[0] if isinstance(n, tuple) else n for n in names)
    raise SAEError(f"{where}: tensor {plain} is missing; found {', '.join(sorted(map(str, arrays))) or 'none'}")


def read_dictionary_learning(folder: Path, dtype: str | None) -> Dictionary:
    """config.json and ae.pt of dictionary_learning (a trainer_i folder)."""
    where, config = folder / "ae.pt", read_object(folder / "config.json")
    trainer = config.get("trainer") or {}
    kind = needed(trainer, "dict_class", folder / "config.json")
    if kind not in DICT_CLASSES:
        raise SAEError(f"{folder / 'config.json'}: trainer.dict_class is {kind!r}; known: {', '.join(DICT_CLASSES)}")
    architecture, centres = DICT_CLASSES[kind]
    arrays = state_dict(where)
    place = PLACES.get(str(trainer.get("submodule_name", "resid_post")).split("_layer")[0], "resid_post")
    fields = {
        "architecture": architecture,
        "d_in": needed(trainer, "activation_dim", folder / "config.json"),
        "d_sae": needed(trainer, "dict_size", folder / "config.json"),
        "k": trainer.get("k") if architecture == "topk" else None,
        "apply_b_dec_to_input": centres,
        "hook_name": None if trainer.get("layer") is None else f"blocks.{trainer['layer']}.{place}",
        "model_name": trainer.get("lm_name"),
        "context_size": (config.get("buffer") or {}).get("ctx_len"),
        "dtype": dtype or "float32",
    }
    cfg = make_config(fields, folder / "config.json")
    names: dict[str, Any] = {
        "W_enc": first(arrays, where, "W_enc", ("encoder.weight", "T")),
        "W_dec": first(arrays, where, "W_dec", ("decoder.weight", "T")),
        "b_dec": first(arrays, where, "b_dec", "bias", "decoder_bias", "decoder.bias"),
    }
    if architecture == "gated":
        names |= {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
    else:
        names["b_enc"] = first(arrays, where, "b_enc", "encoder.bias")
    if architecture == "jumprelu":
        found = np.asarray(arrays[first(arrays, where, "threshold")], np.float32)
        # One number for all latents, -1 where training ended before it was measured.
        names["threshold"] = max(float(found.reshape(-1)[0]), 0.0) if found.size == 1 else "threshold"
    return checked(cfg, parameters(cfg, arrays, names, cfg.dtype, where), where)


def torch_file(path: Path, pattern: str) -> Path | None:
    """The file itself, or the only one in a folder, whose name matches."""
    if path.is_file():
        return path if re.fullmatch(pattern, path.name) else None
    found = sorted(p for p in path.glob("*.pt") if re.fullmatch(pattern, p.name)) if path.is_dir() else []
    return found[0] if len(found) == 1 else None


def read_qwen_scope(path: Path, dtype: str | None) -> Dictionary:
    """A layerN.sae.pt of Qwen-Scope. k is in the repository's name (...-W32K-L0_100) or in a config.json beside the file.

    b_dec is not subtracted from the input.
    """
    where = torch_file(path, QWEN)
    assert where is not None
    arrays = state_dict(where)
    named = re.search(r"SAE-Res-(.+?)-W(\d+)K-L0_(\d+)", where.absolute().as_posix())
    beside = maybe_object(where.parent / "config.json")
    k = beside.get("k", beside.get("top_k", int(named[3]) if named else None))
    if k is None:
        raise SAEError(f"{where}: how many latents a token keeps is in the repository's name (SAE-Res-MODEL-W32K-L0_100), which the path lacks: "
                       'keep the folder\'s name, or put {"k": K} into a config.json beside it')  # fmt: skip
    if "W_enc" not in arrays or np.ndim(arrays["W_enc"]) != 2:
        raise SAEError(f"{where}: tensor W_enc is missing; found {', '.join(sorted(map(str, arrays))) or 'none'}")
    d_sae, d_in = arrays["W_enc"].shape
    layer = re.match(r"layer(\d+)", where.name)
    fields = {
        "architecture": "topk",
        "d_in": d_in,
        "d_sae": d_sae,
        "k": k,
        "apply_b_dec_to_input": False,
        "hook_name": f"blocks.{layer[1]}.resid_post" if layer else None,
        "model_name": f"Qwen/{named[1]}" if named else None,
        "dtype": dtype or "float32",
    }
    cfg = make_config(fields, where)
    names = {"W_enc": ("W_enc", "T"), "W_dec": ("W_dec", "T"), "b_enc": "b_enc", "b_dec": "b_dec"}
    return checked(cfg, parameters(cfg, arrays, names, cfg.dtype, where), where)


def read_openai(path: Path, dtype: str | None) -> Dictionary:
    """A file of OpenAI's sparse_autoencoder; TopK ones normalise each row, as "layer_norm" here does."""
    where = torch_file(path, r".*\.pt")
    assert where is not None
    found = state_dict(where)
    if "encoder.weight" not in found:
        raise SAEError(f"{where}: tensor encoder.weight is missing; found {', '.join(sorted(map(str, found))) or 'none'}")
    kind = found.get("activation", "ReLU")
    if kind not in ("ReLU", "TopK"):
        raise SAEError(f"{where}: activation is {kind!r}; 'ReLU' and 'TopK' are supported")
    d_sae, d_in = found["encoder.weight"].shape
    options = found.get("activation_state_dict") or {}
    k = options.get("k")
    fields = {
        "architecture": "topk" if kind == "TopK" else "relu",
        "d_in": d_in,
        "d_sae": d_sae,
        "k": None if k is None else int(k),
        "normalize_activations": "layer_norm" if kind == "TopK" else "none",
        "dtype": dtype or "float32",
    }
    cfg = make_config(fields, where)
    names = {"W_enc": ("encoder.weight", "T"), "W_dec": ("decoder.weight", "T"), "b_enc": "latent_bias", "b_dec": "pre_bias"}
    return checked(cfg, parameters(cfg, found, names, cfg.dtype, where), where)


def is_openai(path: Path) -> bool:
    """Whether there is one torch file, and it holds what that library writes."""
    file = torch_file(path, r".*\.pt")
    if file is None or torch_file(path, QWEN) is not None:
        return False
    try:
        return {"pre_bias", "latent_bias"} <= state_dict(file).keys()
    except SAEError:
        return True  # its reader says what is wrong with the file


QWEN = r"layer\d+\.sae\.pt"
DICTIONARY_LEARNING = Layout(
    holds="config.json (with trainer) and ae.pt",
    found=lambda path: (path / "ae.pt").exists() or "dict_class" in (maybe_object(path / "config.json").get("trainer") or {}),
    read=read_dictionary_learning,
    hub_files=("config.json", "ae.pt"),
)
QWEN_SCOPE = Layout(
    holds="layerN.sae.pt", found=lambda path: torch_file(path, QWEN) is not None, read=read_qwen_scope, hub_files=("layer*.sae.pt", "config.json")
)
OPENAI = Layout(holds="a .pt file with pre_bias and latent_bias", found=is_openai, read=read_openai, hub_files=("*.pt",))
