"""What the file layouts share: how a folder is told, how tensors are read without being in memory twice, how mistakes are named."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae.config import DTYPES, SAEConfig
from sae.dictionary import Dictionary, check_params, param_shapes
from sae.errors import SAEError
from sae.formats.arrays import Arrays

BLOCK_BYTES = 8 << 20  # of a tensor that are cast and turned at a time

TAP_PAIRS = (  # our tap kind, TransformerLens's hook, which most libraries use; both follow "blocks.N."
    ("resid_pre", "hook_resid_pre"),
    ("resid_mid", "hook_resid_mid"),
    ("resid_post", "hook_resid_post"),
    ("attn_out", "hook_attn_out"),
    ("attn_probs", "attn.hook_pattern"),
    ("attn_z", "attn.hook_z"),  # rows of all heads side by side
    ("mlp_normalized", "ln2.hook_normalized"),  # of LayerNorm models as TransformerLens folds them; of RMS norms however they are read
    ("mlp_in", "mlp.hook_in"),
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


def from_module_path(path: str | None, entering: bool = False) -> str | None:
    """Our name of a module's output, by a transformers model's path: "layers.5", "model.layers.5.mlp", "h.5.attn"; other names pass unchanged.
    entering: of its input, known of layers and MLPs (else None)."""
    if path and path.split(".")[-1] in ("embed_tokens", "wte", "embed_in") and not entering:
        return "embed"
    match = re.fullmatch(r"(?:\w+\.)*?(?:layers|h)[._](\d+)(?:\.(mlp|self_attn|attn|attention))?", path or "")
    if not match:
        return None if entering else path
    if entering:
        return {None: f"blocks.{match[1]}.resid_pre", "mlp": f"blocks.{match[1]}.mlp_in"}.get(match[2])
    kind = {None: "resid_post", "mlp": "mlp_out"}.get(match[2], "attn_out")
    return f"blocks.{match[1]}.{kind}"


def rename_hook(hook: str | None, kinds: dict[str, str], whole: dict[str, str]) -> str | None:
    """A hook's name in another library's words: `kinds` for what follows the block's number, `whole` for other names."""
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", hook or "")
    if match:
        return match[1] + kinds.get(match[2], match[2])
    return whole.get(hook, hook) if hook else hook


@dataclasses.dataclass(frozen=True)
class Layout:
    """A file layout.

    holds: in words, the files that it is told by. found(path) -> whether the folder (or file) is one. read(path, dtype) -> Dictionary;
    dtype None: the one that the files say. hub_files: patterns of what to fetch from a repository's folder. write(dictionary) ->
    {file name: JSON object or {name: array}}, where it can be saved so.
    """

    holds: str
    found: Callable[[Path], bool]
    read: Callable[[Path, str | None], Dictionary]
    hub_files: tuple[str, ...]
    write: Callable[[Dictionary], dict[str, dict[str, Any]]] | None = None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; SAEError, naming the file, where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise SAEError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise SAEError(f"{path}: holds no JSON object")
    return value


def maybe_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one: for telling layouts apart, where the reader will name what is wrong."""
    try:
        return read_object(path)
    except SAEError:
        return {}


def needed(config: Mapping[str, Any], name: str, where: Path | str) -> Any:
    """A field of a config file. Raises SAEError where it is missing."""
    if config.get(name) is None:
        raise SAEError(f"{where}: {name} is missing")
    return config[name]


def refuse(config: Mapping[str, Any], where: Path | str, **only: Any) -> None:
    """Raises SAEError for a field whose value is another than the given one, which is all that is supported."""
    for name, value in only.items():
        if name in config and config[name] != value:
            raise SAEError(f"{where}: {name} is {config[name]!r}; only {value!r} is supported")


def make_config(fields: dict[str, Any], where: Path | str) -> SAEConfig:
    """SAEConfig from a file's fields; what is wrong is named with the file."""
    try:
        return SAEConfig(**fields)
    except SAEError as error:
        raise SAEError(f"{where}: {error}") from None
    except TypeError:
        wrong = next((n for n in ("d_in", "d_sae", "k") if not isinstance(fields.get(n), int)), "a field")
        raise SAEError(f"{where}: {wrong} is {fields.get(wrong)!r}; give a whole number") from None


def dtype_of(name: Any, default: str = "float32") -> str:
    """A config's dtype in our words: "torch.bfloat16" and the like; float64 becomes float32."""
    found = str(name or default).removeprefix("torch.").replace("float64", "float32")
    return found if found in DTYPES else default


def converted(array: Any, dtype: str, transpose: bool = False, scale: Any = None) -> jnp.ndarray:
    """A tensor of a file in `dtype`, turned if asked for, times `scale` (what broadcasts over the result) in fp32, made a block at a time: beside
    the result a few times BLOCK_BYTES are held.

    What is finite in the file and not in `dtype` (fp16 ends at 65,504) is the caller's to notice: see `checked`.
    """
    shape = array.shape[::-1] if transpose else array.shape
    out = aligned(shape, jnp.dtype(dtype))
    scale = None if scale is None else np.broadcast_to(np.asarray(scale, np.float32), shape)  # a view
    into, by = (out.T, None if scale is None else scale.T) if transpose else (out, scale)
    rows = block_rows(array)
    for start in range(0, array.shape[0], rows) if array.ndim > 1 else (None,):
        part = ... if start is None else slice(start, start + rows)
        with np.errstate(over="ignore"):  # `checked` names what overflowed
            block = np.asarray(array[part])
            into[part] = block.astype(out.dtype) if by is None else block.astype(np.float32) * by[part]
    return jax.device_put(out, may_alias=True)


def block_rows(array: Any) -> int:
    """How many rows of a tensor are cast at a time."""
    return max(1, BLOCK_BYTES // max(array[:1].nbytes, 1)) if array.ndim > 1 else 1


def file_norms(array: Any, turned: bool = False) -> np.ndarray:
    """[F] fp32 norms of a decoder's rows, of a file's tensor [F, E] (turned: [E, F]), a block at a time."""
    squares, rows = np.zeros(array.shape[1 if turned else 0], np.float32), block_rows(array)
    for start in range(0, array.shape[0], rows):
        block = np.square(np.asarray(array[start : start + rows]).astype(np.float32))
        if turned:
            squares += block.sum(axis=0)
        else:
            squares[start : start + rows] = block.sum(axis=1)
    return np.sqrt(squares)


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array at an address that is a multiple of 64: one that JAX can take over on a CPU without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    whole = np.empty(size + 64, np.uint8)
    begin = -whole.ctypes.data % 64
    return whole[begin : begin + size].view(dtype).reshape(shape)


def parameters(
    cfg: SAEConfig, arrays: Arrays, names: Mapping[str, Any], dtype: str, where: Path | str, scales: Mapping[str, Any] | None = None
) -> dict[str, jnp.ndarray]:
    """Our parameters from a file's tensors. names: ours -> theirs, or (theirs, "T") for a transposed one, or a number that fills it. scales:
    ours -> what broadcasts over it and multiplies it."""
    params, shapes = {}, param_shapes(cfg)
    for ours, theirs in names.items():
        if isinstance(theirs, (int, float)):
            params[ours] = jnp.full(shapes[ours], theirs, dtype)
            continue
        name, turned = theirs if isinstance(theirs, tuple) else (theirs, "")
        if name not in arrays:
            raise SAEError(f"{where}: tensor {name} is missing; found {', '.join(sorted(arrays)) or 'none'}")
        expected = shapes[ours][::-1] if turned else shapes[ours]
        if tuple(arrays[name].shape) != expected:
            raise SAEError(f"{where}: {name} has shape {tuple(arrays[name].shape)}; the config says {expected}")
        params[ours] = converted(arrays[name], dtype, bool(turned), (scales or {}).get(ours))
    return params


def checked(cfg: SAEConfig, params: Mapping[str, Any], where: Path | str) -> Dictionary:
    """The dictionary, once every tensor that the architecture needs is there with the right shape and is finite."""
    shapes = param_shapes(cfg)
    for name in sorted(shapes.keys() | params.keys()):
        if name not in shapes:
            raise SAEError(f"{where}: unexpected tensor {name}; a {cfg.architecture} SAE has {', '.join(sorted(shapes))}")
        if name not in params:
            raise SAEError(f"{where}: tensor {name} is missing")
        if tuple(params[name].shape) != shapes[name]:
            raise SAEError(f"{where}: {name} has shape {tuple(params[name].shape)}; the config says {shapes[name]}")
    check_params({name: params[name] for name in shapes}, cfg.dtype, where)
    return Dictionary({name: jnp.asarray(params[name], cfg.dtype) for name in shapes}, cfg)
