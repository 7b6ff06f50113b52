"""Writes Hugging Face checkpoints: atomic, sharded, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import glob
import json
import operator
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from models.adapted import Adapted
from models.config import ModelConfig
from models.errors import ModelError
from models.families import tensor_of
from models.hf import INDEX, SINGLE, leaves_of, read_json
from models.hf_config import config_to_hf
from models.hub import resolve
from models.tensors import Tensor
from models.tokenizer import TOKENIZER_FILES, tokenizer_files
from models.transformer import Params, abstract_params

# What a checkpoint folder may hold; any other file in it keeps us from replacing the folder.
_OURS = ("config.json", "generation_config.json", INDEX, *TOKENIZER_FILES)
_LOCK, _OLD = "lock", "old"  # beside the contents in the hidden folder of `replacing`
_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def save(
    folder: str | os.PathLike,
    cfg: ModelConfig,
    params: Params,
    tokenizer_from: Any = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Writes config.json, generation_config.json, safetensors and the tokenizer's files; `transformers` reads them.

    params: an adapted matrix (`models.adapted`) is written merged, one layer in memory at a time.

    folder: made if absent. An existing checkpoint is replaced by renames, its tokenizer kept if no other is given.
    tokenizer_from: a folder, hub id or tokenizer to copy the tokenizer from. max_shard_size: bytes a file; larger
    models get several files and an index. An interrupted export leaves the target as it was; what a killed one leaves, see
    `replacing`. On several hosts every process must call this; the first one writes.
    Raises ModelError when params do not fit cfg or `folder` holds something that is not a checkpoint.
    """
    target = Path(folder).expanduser().absolute()
    _check_params(cfg, params)
    _check_target(target)
    hf = config_to_hf(cfg)
    writer = jax.process_index() == 0
    try:
        with replacing(target) if writer else contextlib.nullcontext(target) as contents:
            _write_tensors(contents, cfg, params, max_shard_size, writer)
            if writer:
                _write_json(contents / "config.json", hf)
                ends = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if hf[key] is not None}
                _write_json(contents / "generation_config.json", ends)
                _copy_tokenizer(contents, target, tokenizer_from)
    except OSError as error:
        raise ModelError(f"{target}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """An empty folder to be filled, which takes the place of `target` by a rename when the block ends well; else `target` stays as it was.

    It lies in a hidden folder beside `target` (".NAME.XXXXXXXX"), and one that a killed process left there is removed first: its lock has no
    holder. If that was killed between the two renames of a replacement, the old folder is put back before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_left_over(target)
    hidden = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        with open(hidden / f"{_LOCK}.new", "w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: there nobody removes what is left
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (hidden / f"{_LOCK}.new").rename(hidden / _LOCK)  # who sees the lock sees it held
            contents = hidden / target.name
            contents.mkdir()  # inside, because mkdtemp's own folder is closed to other users
            yield contents
            _replace(contents, target, hidden / _OLD)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _clear_left_over(target: Path) -> None:
    """Removes the hidden folders of `replacing` whose makers are gone."""
    for hidden in target.parent.glob(f".{glob.escape(target.name)}.????????"):
        with contextlib.suppress(OSError), open(hidden / _LOCK, "r+") as lock:  # no lock: not ours
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (hidden / _OLD).is_dir() and not target.exists():
                os.replace(hidden / _OLD, target)
            shutil.rmtree(hidden, ignore_errors=True)


def _check_params(cfg: ModelConfig, params: Params) -> None:
    expected = dict(leaves_of(abstract_params(cfg)))
    given = dict(leaves_of(params))
    for name in expected.keys() | given.keys():
        if name not in given or name not in expected:
            raise ModelError(f"params do not fit the config: {'missing' if name not in given else 'unexpected'} {name}")
        if given[name].shape != expected[name].shape:
            shapes = f"expected shape {list(expected[name].shape)}, found {list(given[name].shape)}"
            raise ModelError(f"params do not fit the config: {name}: {shapes}")
        if str(given[name].dtype) not in _DTYPE_NAMES:
            known = ", ".join(_DTYPE_NAMES)
            raise ModelError(f"params: {name}: dtype {given[name].dtype} cannot be exported; known: {known}")


def _check_target(target: Path) -> None:
    """Refuses a file, and a folder with anything in it that is not part of a checkpoint."""
    if target.exists() and not target.is_dir():
        raise ModelError(f"{target}: is a file; give a folder")
    entries = sorted(target.iterdir()) if target.is_dir() else []
    foreign = [p for p in entries if p.name not in _OURS and p.suffix != ".safetensors"]
    if not foreign and entries and "model_type" not in read_json(target / "config.json"):
        foreign = [target / "config.json"]
    if foreign:
        raise ModelError(f"{target}: neither empty nor a checkpoint (it holds {foreign[0].name}); give another folder")


def _write_tensors(folder: Path, cfg: ModelConfig, params: Params, max_shard_size: int, writer: bool) -> None:
    shards: list[list[tuple[str, _Entry]]] = [[]]
    filled = 0
    for name, entry in _entries(cfg, params):
        if filled + entry.nbytes > max_shard_size and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append((name, entry))
        filled += entry.nbytes
    total = len(shards)
    names = [SINGLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    for file, shard in zip(names, shards, strict=True):
        _write_safetensors(folder / file, dict(shard), writer)
    if total > 1 and writer:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard}
        size = sum(entry.nbytes for shard in shards for _, entry in shard)
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


class _Entry:
    """A tensor to be written: what the header says of it, and how to get its contents when its turn comes."""

    def __init__(self, dtype: str, shape: tuple[int, ...], itemsize: int, contents: Callable[[], np.ndarray]):
        self.dtype, self.shape, self.contents = dtype, shape, contents
        self.nbytes = int(np.prod(shape)) * itemsize


def _entries(cfg: ModelConfig, params: Params) -> Iterator[tuple[str, _Entry]]:
    """What is written, in order: each tensor where the first of the leaves that lie in it stands."""
    shared: dict[str, list[tuple[Tensor, jax.Array | np.ndarray]]] = {}
    for leaf, array in leaves_of(params):
        shared.setdefault(tensor_of(cfg, leaf).name, []).append((tensor_of(cfg, leaf), array))
    for parts in shared.values():
        tensor, array = parts[0]
        if len({str(a.dtype) for _, a in parts}) > 1:
            raise ModelError(f"params: leaves that lie in one tensor, {tensor.name}, have several dtypes: {[str(a.dtype) for _, a in parts]}")
        shape = tensor.stored_shape(array.shape[-len(tensor.ours) :])
        here = [(part, np.asarray(a) if _is_host_memory(a) else a) for part, a in parts]
        for place, name in np.ndenumerate(tensor.names(cfg)):
            contents = functools.partial(_contents, here, place, shape)
            yield name, _Entry(_DTYPE_NAMES[str(array.dtype)], shape, array.dtype.itemsize, contents)


def _contents(parts: list[tuple[Tensor, Any]], place: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """One tensor as in the file, put together from the leaves (or one layer, one expert of them) that lie in it."""
    values = [(tensor, _to_host(functools.reduce(operator.getitem, place, array))) for tensor, array in parts]
    if len(values) == 1 and not values[0][0].beside:
        return values[0][0].to_stored(values[0][1])
    whole = np.empty(shape, values[0][1].dtype)
    for tensor, value in values:
        tensor.write(whole, value)
    return whole


def _is_host_memory(array: jax.Array | np.ndarray | Adapted) -> bool:
    """Whether numpy can look at the whole array without a copy."""
    if isinstance(array, (np.ndarray, Adapted)):
        return isinstance(array, np.ndarray)
    return len(array.devices()) == 1 and next(iter(array.devices())).platform == "cpu"


def _to_host(array: jax.Array | np.ndarray | Adapted) -> np.ndarray:
    array = array.merged() if isinstance(array, Adapted) else array
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _write_safetensors(path: Path, entries: dict[str, _Entry], writer: bool) -> None:
    """The safetensors layout: header length (u64), JSON header padded to 8 bytes, then the tensors back to back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say "pt"
    offset = 0
    for name, entry in entries.items():
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, offset + entry.nbytes]}
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path if writer else os.devnull, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries.values():
            file.write(np.ascontiguousarray(entry.contents()).view(np.uint8).data)
        file.flush()
        if writer:
            os.fsync(file.fileno())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_tokenizer(folder: Path, target: Path, source: Any) -> None:
    """Into `folder`, from a tokenizer object, folder or hub id; from the `target` to be replaced if none is given."""
    if hasattr(source, "save_pretrained"):
        source.save_pretrained(folder)
        return
    files = tokenizer_files(target if source is None else resolve(source, TOKENIZER_FILES))
    if source is not None and not files:
        raise ModelError(f"tokenizer_from: {source} has no tokenizer")
    for path in files:
        shutil.copyfile(path, folder / path.name)


def _replace(new: Path, target: Path, old: Path) -> None:
    """Puts the finished folder in its place; a checkpoint there steps aside to `old` first, and back on failure."""
    if target.is_dir():
        os.replace(target, old)
    try:
        os.replace(new, target)
    except BaseException:
        if old.is_dir():
            os.replace(old, target)
        raise
