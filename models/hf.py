"""Hugging Face checkpoints: read straight into stacked arrays or shards, and written back bit for bit.

Nothing here ever holds two copies of a model in host memory: reading fills each stacked leaf (or each shard of it)
from small pieces of one tensor at a time, writing streams one tensor at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from models.config import ModelConfig
from models.errors import ModelError
from models.families import DTYPES, FAMILIES, Family, tensor_of
from models.hf_config import config_from_hf, token_ids
from models.hub import resolve
from models.sharding import param_shardings
from models.transformer import Params, abstract_params

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that old exports carry
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Of a tensor, read at once: it is in memory up to three times, as pages of the file, as a copy of them, and as the last copy, which the C
# library keeps for the next.
_PIECE_BYTES = 2**23


# --- reading ---------------------------------------------------------------------------------------------------------


def load(source: str | os.PathLike, dtype: str | None = None, mesh: Mesh | None = None) -> tuple[ModelConfig, Params]:
    """(cfg, params) of a Hugging Face folder or hub id ("org/name", "org/name@revision").

    dtype: "float32", "bfloat16" or "float16"; None keeps config.json's, but float16 becomes float32, which holds it
      exactly.
    mesh: build every parameter sharded by `models.sharding`; a process reads only the slices that its devices hold.
    Raises ModelError, naming file and tensor or field, for anything missing, truncated, unexpected or misshapen.
    """
    folder = resolve(source, ("*.json", "*.safetensors"))
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype={dtype!r} is not supported; known: {', '.join(DTYPES)}")
    cfg = read_config(folder)
    cfg = dataclasses.replace(cfg, dtype=dtype or cfg.dtype)
    checkpoint = _Checkpoint(folder, FAMILIES[cfg.family])
    checkpoint.check(cfg)
    leaves = dict(leaves_of(abstract_params(cfg)))
    shardings = dict(leaves_of(param_shardings(cfg, mesh))) if mesh is not None else {}
    params: Params = {}
    progress = {"desc": f"load {folder.name}", "unit": "leaf", "disable": None, "mininterval": 0.5, "leave": False}
    for name, leaf in tqdm(leaves.items(), **progress):
        read = checkpoint.reader(cfg, name, leaf)
        if mesh is None:
            # The buffer is aligned, so that on CPU this takes it over without a copy.
            array = jax.device_put(read((slice(None),) * len(leaf.shape)))
        else:
            array = jax.make_array_from_callback(leaf.shape, shardings[name], read)
        group, _, key = name.partition(".")
        params.setdefault(group, {})[key] = array
    return cfg, params


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a local folder; generation_config.json, where there is one, says what ends a generation."""
    contents = read_json(folder / "config.json")
    try:
        cfg = config_from_hf(contents)
    except ModelError as error:
        raise ModelError(f"{folder / 'config.json'}: {str(error).removeprefix('config.json: ')}") from error
    generation = folder / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.is_file() else None
    if ends is None:
        return cfg
    return dataclasses.replace(cfg, eos_token_ids=token_ids(ends, cfg.vocab_size, str(generation)))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ModelError, naming the file, where there is none."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def leaves_of(tree: Params) -> Iterator[tuple[str, Any]]:
    """("blocks.q", leaf) for every leaf of a parameter tree, or of a tree of the same shape."""
    for group, leaves in tree.items():
        for key, leaf in leaves.items():
            yield f"{group}.{key}", leaf


class _Checkpoint:
    """The safetensors files of a folder, tensors by the family's names (`Family.name_of`), buffers left out.

    A file is open only while a piece of a tensor is read, so that its pages can go.
    """

    def __init__(self, folder: Path, family: Family):
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files: dict[str, Path] = {}
        self.stored: dict[str, str] = {}  # what the file calls it
        for path in self._paths():
            with _opened(path) as file:
                for stored in file.keys():  # noqa: SIM118  (not a dict)
                    name = family.name_of(stored)
                    if name.endswith((*_IGNORED, *family.buffers)):
                        continue
                    if self.stored.get(name, stored) != stored:
                        raise ModelError(f"{path}: {stored} and {self.stored[name]} are the same parameter")
                    self.stored[name] = stored
                    part = file.get_slice(stored)
                    if part.get_dtype() not in _DTYPES:
                        known = ", ".join(_DTYPES)
                        raise ModelError(f"{path}: {stored}: dtype {part.get_dtype()} is not supported; known: {known}")
                    self.shapes[name], self.files[name] = tuple(part.get_shape()), path

    def _paths(self) -> list[Path]:
        if (self.folder / INDEX).is_file():
            weight_map = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(weight_map, Mapping) or not all(isinstance(v, str) for v in weight_map.values()):
                raise ModelError(f"{self.folder / INDEX}: weight_map must be an object {{tensor: file name}}")
            paths = [self.folder / name for name in sorted(set(weight_map.values()))]
        else:
            paths = [self.folder / SINGLE]
        for path in paths:
            if not path.is_file():
                other = sorted(p.name for p in self.folder.glob("*.bin"))
                hint = f" (found {other[0]}: convert it to safetensors first)" if other else ""
                raise ModelError(f"{path}: no such file{hint}")
        return paths

    def check(self, cfg: ModelConfig) -> None:
        """Raises ModelError for the first missing, misshapen or unexpected tensor."""
        expected = {}
        for leaf, abstract in leaves_of(abstract_params(cfg)):
            tensor = tensor_of(cfg, leaf)
            shape = tensor.stored_shape(abstract.shape[-len(tensor.ours) :])
            expected |= dict.fromkeys(tensor.names(cfg).flat, shape)
        for name, shape in expected.items():
            if name not in self.shapes:
                raise ModelError(f"{self.folder}: missing tensor {name} {list(shape)}")
            if (found := self.shapes[name]) != shape:
                raise ModelError(
                    f"{self.files[name]}: {name}: expected shape {list(shape)} by config.json, found {list(found)}"
                )
        for name in sorted(self.shapes.keys() - expected.keys()):
            if cfg.tie_embeddings and name == tensor_of(cfg, "lm_head.kernel").name:
                self._check_tied(name, tensor_of(cfg, "embed.embedding").name)
            else:
                raise ModelError(f"{self.files[name]}: unexpected tensor {self.stored[name]} for this {cfg.family} config.json")

    def _check_tied(self, head: str, embedding: str) -> None:
        """Some exports of tied models store the head too; it must then be the embedding."""
        same = self.shapes[head] == self.shapes[embedding]
        rows = max(1, _PIECE_BYTES // (8 * max(1, math.prod(self.shapes[head][1:]))))  # of both, of up to 8 bytes: they are never whole in memory
        count = self.shapes[head][0]
        parts = (slice(start, min(start + rows, count)) for start in range(0, count, rows)) if same else ()
        if not same or any(not np.array_equal(self._read(head, part), self._read(embedding, part)) for part in parts):
            raise ModelError(
                f"{self.files[head]}: {head} differs from {embedding}, but config.json says tie_word_embeddings"
            )

    def _read(self, name: str, index) -> np.ndarray:
        path = self.files[name]
        with _opened(path) as file:
            try:
                return file.get_slice(self.stored[name])[index]
            except SafetensorError as error:
                raise ModelError(f"{path}: {name}: cannot be read: {error}") from error

    def reader(self, cfg: ModelConfig, leaf: str, abstract: jax.ShapeDtypeStruct):
        """read(index) -> that part of the leaf (index: a slice for each axis), as a fresh aligned array."""
        tensor = tensor_of(cfg, leaf)
        names = tensor.names(cfg)
        shape, stacked = abstract.shape[names.ndim :], names.ndim

        def read(index: tuple[slice, ...]) -> np.ndarray:
            sizes = [len(range(*s.indices(size))) for s, size in zip(index, abstract.shape, strict=True)]
            out = _aligned(sizes, abstract.dtype)
            wanted = names[(*index[:stacked], ...)].ravel()
            for part, name in zip(out.reshape(len(wanted), *sizes[stacked:]), wanted, strict=True):
                for place, piece in tensor.pieces(shape, index[stacked:], _PIECE_BYTES // 4):
                    part[place] = tensor.read(functools.partial(self._read, name), shape, piece)
            return out

        return read


def _opened(path: Path):
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a complete safetensors file ({error}); fetch or export it again") from error


def _aligned(shape, dtype, alignment: int = 64) -> np.ndarray:
    """An empty array at an address that JAX on CPU can take over without copying."""
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)
