"""Reading and writing dictionaries: our own layout and those of other libraries.

A layout is a row of `LAYOUTS`: two file names, and two pure functions between (config dict, tensors) and Dictionary.
Every reader ends in the canonical parameters of the architecture table; norms that a format keeps apart are folded in.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file
from safetensors.numpy import save_file

from sae.architectures import ARCHITECTURES
from sae.config import SAEConfig
from sae.dictionary import Dictionary, fold_decoder_norm, fold_input_scale, param_shapes
from sae.errors import SAEError

SAELENS_VERSION = "6.0.0"  # the first release that writes this layout of cfg.json
SCALER, SCALE = "activation_scaler.json", "scaling_factor"  # where a checkpoint of SAELens keeps the scale of its inputs
TAP_PAIRS = (  # our tap kind, TransformerLens's hook, which SAELens uses; both follow "blocks.N."
    ("resid_pre", "hook_resid_pre"),
    ("resid_mid", "hook_resid_mid"),
    ("resid_post", "hook_resid_post"),
    ("attn_out", "hook_attn_out"),
    ("attn_probs", "attn.hook_pattern"),
    ("mlp_pre", "mlp.hook_pre"),
    ("mlp_act", "mlp.hook_post"),
    ("mlp_out", "hook_mlp_out"),
)
WHOLE_PAIRS = (("embed", "hook_embed"), ("final_norm", "ln_final.hook_normalized"))


def to_transformer_lens(hook: str | None) -> str | None:
    """TransformerLens's name of one of our taps; other names pass unchanged."""
    return rename_hook(hook, dict(TAP_PAIRS), dict(WHOLE_PAIRS))


def from_transformer_lens(hook: str | None) -> str | None:
    """Our name of a TransformerLens hook; other names pass unchanged."""
    return rename_hook(hook, {b: a for a, b in TAP_PAIRS}, {b: a for a, b in WHOLE_PAIRS})


def rename_hook(hook: str | None, kinds: dict[str, str], whole: dict[str, str]) -> str | None:
    """A hook's name in another library's words: `kinds` for what follows the block's number, `whole` for other names."""
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", hook or "")
    if match:
        return match[1] + kinds.get(match[2], match[2])
    return whole.get(hook, hook) if hook else hook


def native_read(config: dict[str, Any], tensors: dict[str, Any], where: str) -> Dictionary:
    """Our own layout: SAEConfig's fields under "sae"."""
    fields = config.get("sae")
    if not isinstance(fields, dict):
        raise SAEError(f"{where}: no object named 'sae'; this is not a dictionary saved by sae.save")
    known = {f.name for f in dataclasses.fields(SAEConfig)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise SAEError(f"{where}: unknown field sae.{unknown[0]}; known: {', '.join(sorted(known))}")
    if fields.get("normalize_activations") == "expected_average_only_in" and "input_scale" not in fields:
        raise SAEError(f"{where}: sae.input_scale is missing; normalize_activations 'expected_average_only_in' needs it")
    return checked(make_config(fields, where), tensors, where)


def native_write(d: Dictionary) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config, tensors) in our own layout."""
    return {"format": "jaxrl_llm.sae", "version": 1, "sae": dataclasses.asdict(d.cfg)}, dict(d.params)


def saelens_read(config: dict[str, Any], tensors: dict[str, Any], where: str) -> Dictionary:
    """SAELens's cfg.json, version 6 (metadata nested) or older (flat)."""
    meta = config.get("metadata")
    flat = config if meta is None else meta
    names = {arch.saelens: name for name, arch in ARCHITECTURES.items()}
    kind, k = config.get("architecture", "standard"), config.get("k")
    if config.get("activation_fn_str", config.get("activation_fn")) == "topk":  # before version 6
        kind, k = "topk", (config.get("activation_fn_kwargs") or {}).get("k")
    if kind not in names:
        raise SAEError(f"{where}: unknown architecture {kind!r}; known: {', '.join(names)}")
    if config.get("reshape_activations", "none") != "none":
        raise SAEError(f"{where}: reshape_activations is {config['reshape_activations']!r}; only 'none' is supported")
    norm = config.get("normalize_activations") or "none"
    if norm is True:
        norm = "expected_average_only_in"
    scale = 1.0 if norm != "expected_average_only_in" else saelens_input_scale(config, where)
    fields = {
        "architecture": names[kind],
        "d_in": config.get("d_in"),
        "d_sae": config.get("d_sae"),
        "k": k if ARCHITECTURES[names[kind]].needs_k else None,
        "normalize_activations": norm,
        "input_scale": scale,
        "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", True)),
        "hook_name": from_transformer_lens(flat.get("hook_name", flat.get("hook_point"))),
        "model_name": flat.get("model_name"),
        "context_size": flat.get("context_size"),
        "dtype": str(config.get("dtype", "float32")).removeprefix("torch.").replace("float64", "float32"),
    }
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not np.all(np.asarray(scaling, np.float32) == 1.0):
        raise SAEError(f"{where}: a scaling_factor other than 1 is not supported")
    d = checked(make_config(fields, where), tensors, where)
    return fold_decoder_norm(d) if config.get("rescale_acts_by_decoder_norm") else d


def saelens_input_scale(config: dict[str, Any], where: str) -> float:
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


def saelens_write(d: Dictionary) -> tuple[dict[str, Any], dict[str, Any]]:
    """SAELens 6: the input scale is folded into the weights, as that library does when it saves."""
    d = fold_input_scale(d)
    cfg = d.cfg
    config = {
        "architecture": ARCHITECTURES[cfg.architecture].saelens,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "dtype": cfg.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": cfg.normalize_activations,
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
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
    return config, dict(d.params)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A folder layout: its two files and the functions between their contents and a Dictionary. scale_file: a JSON object that may
    lie beside them, read as further fields of the config."""

    config_file: str
    weights_file: str
    read: Callable[[dict[str, Any], dict[str, Any], str], Dictionary]
    write: Callable[[Dictionary], tuple[dict[str, Any], dict[str, Any]]]
    scale_file: str | None = None

    def files(self) -> list[str]:
        """The names of its files."""
        return [name for name in (self.config_file, self.weights_file, self.scale_file) if name]


LAYOUTS: dict[str, Layout] = {
    "native": Layout("sae.json", "sae.safetensors", native_read, native_write),
    "saelens": Layout("cfg.json", "sae_weights.safetensors", saelens_read, saelens_write, SCALER),
}


def make_config(fields: dict[str, Any], where: str) -> SAEConfig:
    """SAEConfig from a file's fields; what is wrong is named with the file."""
    try:
        return SAEConfig(**fields)
    except SAEError as error:
        raise SAEError(f"{where}: {error}") from None
    except TypeError:
        wrong = next((n for n in ("d_in", "d_sae", "k") if not isinstance(fields.get(n), int)), "a field")
        raise SAEError(f"{where}: {wrong} is {fields.get(wrong)!r}; give a whole number") from None


def checked(cfg: SAEConfig, tensors: dict[str, Any], where: str) -> Dictionary:
    """The dictionary, once every tensor that the architecture needs is there with the right shape and is finite."""
    shapes = param_shapes(cfg)
    for name in sorted(shapes.keys() | tensors.keys()):
        if name not in shapes:
            raise SAEError(f"{where}: unexpected tensor {name}; a {cfg.architecture} SAE has {', '.join(sorted(shapes))}")
        if name not in tensors:
            raise SAEError(f"{where}: tensor {name} is missing")
        if tuple(tensors[name].shape) != shapes[name]:
            raise SAEError(f"{where}: {name} has shape {tuple(tensors[name].shape)}; the config says {shapes[name]}")
        if not bool(jnp.isfinite(jnp.asarray(tensors[name], jnp.float32).sum())):
            raise SAEError(f"{where}: {name} holds a NaN or an infinity")
    return Dictionary({name: jnp.asarray(tensors[name], cfg.dtype) for name in shapes}, cfg)


def load(folder_or_hub_id: str | os.PathLike) -> Dictionary:
    """The dictionary in a local folder, or on the Hugging Face hub as "owner/repository[/folder/in/it]".

    The layout is told by the files present (see LAYOUTS). Raises SAEError naming the file and what is wrong in it.
    """
    folder = locate(folder_or_hub_id)
    for layout in LAYOUTS.values():
        if (folder / layout.config_file).exists():
            break
    else:
        names = " or ".join(layout.config_file for layout in LAYOUTS.values())
        raise SAEError(f"{folder}: no {names}; this folder holds no dictionary in a known layout")
    config_path, weights_path = folder / layout.config_file, folder / layout.weights_file
    config = read_object(config_path)
    if layout.scale_file and (folder / layout.scale_file).exists():
        config |= read_object(folder / layout.scale_file)
    try:
        tensors = load_file(weights_path)
    except FileNotFoundError:
        raise SAEError(f"{weights_path}: missing; {layout.config_file} is there, so copy the weights beside it") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise SAEError(f"{weights_path}: not a whole safetensors file ({error}); copy it again") from None
    return layout.read(config, tensors, str(config_path))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; SAEError, naming the file, where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SAEError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise SAEError(f"{path}: holds no JSON object")
    return value


def locate(folder_or_hub_id: str | os.PathLike) -> Path:
    """A local folder, downloaded first if the name is a hub id."""
    folder, name = Path(folder_or_hub_id), str(folder_or_hub_id)
    if folder.is_dir():
        return folder
    parts = name.split("/")
    if len(parts) < 2 or name.startswith((".", "/", "~")) or not all(re.fullmatch(r"[\w.\-]+", p) for p in parts):
        raise SAEError(f"{name}: no such folder, and not a hub id (owner/repository[/folder])")
    from huggingface_hub import snapshot_download  # slow to import, and needed here only

    inside = "/".join(parts[2:])
    files = [f"{inside}/{f}" if inside else f for layout in LAYOUTS.values() for f in layout.files()]
    try:
        return Path(snapshot_download("/".join(parts[:2]), allow_patterns=files)) / inside
    except Exception as error:  # the hub client raises many kinds: network, authentication, absence
        reason = str(error).strip().splitlines()[0]
        raise SAEError(f"{name}: no such folder here, and the hub answered: {reason}") from None


def save(folder: str | os.PathLike, d: Dictionary, layout: str = "native") -> None:
    """Writes the dictionary to `folder` (made if absent), each file whole or not at all; files of the other layouts there go."""
    if layout not in LAYOUTS:
        raise SAEError(f"sae.save: unknown layout {layout!r}; known: {', '.join(LAYOUTS)}")
    folder, row = Path(folder), LAYOUTS[layout]
    config, tensors = row.write(d)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(np.asarray(value)) for name, value in tensors.items()}
        partial = folder / (row.weights_file + ".partial")
        save_file(arrays, partial)
        os.replace(partial, folder / row.weights_file)
        partial = folder / (row.config_file + ".partial")
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / row.config_file)
        for other in LAYOUTS.values():
            if other is not row:  # else `load` would not know which of two dictionaries is meant
                for name in other.files():
                    (folder / name).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise SAEError(f"{folder}: cannot be written ({error})") from None
