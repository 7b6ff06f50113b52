"""Tensors of a file as memory-mapped arrays, by name: safetensors (one file or shards), npz, and PyTorch's zip files without PyTorch.

Nothing is read before it is asked for, and nothing in a file is run: of a pickle, only what describes tensors is understood.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sae.errors import SAEError

Arrays = dict[str, Any]  # name -> memory-mapped array

SAFE_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16, "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
TORCH_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


def safetensors_arrays(path: Path) -> Arrays:
    """The tensors of one safetensors file. Raises SAEError, naming it, where it is missing or not whole."""
    if not path.exists():
        raise SAEError(f"{path}: missing; copy the weights beside their config")
    try:
        with safe_open(path, framework="numpy"):  # checks the header against the file's size
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise SAEError(f"{path}: not a whole safetensors file ({error}); copy it again") from None
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in SAFE_DTYPES:
            raise SAEError(f"{path}: {name} has dtype {entry['dtype']}; known: {', '.join(SAFE_DTYPES)}")
        arrays[name] = mapped(path, SAFE_DTYPES[entry["dtype"]], 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
    return arrays


def sharded_arrays(index: Path) -> Arrays:
    """The tensors of all files that a model.safetensors.index.json names, once their bytes are as many as it says."""
    try:
        found = json.loads(index.read_text())
        files = sorted(set(found["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SAEError(f"{index}: cannot be read as an index of safetensors files ({error!r})") from None
    arrays: Arrays = {}
    for name in files:
        arrays |= safetensors_arrays(index.parent / name)
    lacking = sorted(set(found["weight_map"]) - set(arrays))
    if lacking:
        raise SAEError(f"{index}: tensor {lacking[0]} is in none of {', '.join(files)}")
    total = (found.get("metadata") or {}).get("total_size")
    have = sum(array.nbytes for array in arrays.values())
    if total is not None and total != have:
        raise SAEError(f"{index}: total_size is {total}, but the files hold {have} bytes of tensors; copy them again")
    return arrays


def mapped(path: Path, dtype: Any, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """A read-only array over part of a file."""
    if 0 in shape:
        return np.zeros(shape, dtype)
    try:
        return np.memmap(path, dtype, "r", offset, shape or (1,)).reshape(shape)
    except (OSError, ValueError) as error:
        raise SAEError(f"{path}: not a whole file ({error}); copy it again") from None


def stored_at(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed entry of a zip file begin."""
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        header = file.read(30)
    names, extra = struct.unpack("<HH", header[26:30])
    return entry.header_offset + 30 + names + extra


def zip_entries(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The entries of a zip file. Raises SAEError where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {entry.filename: entry for entry in archive.infolist()}
    except FileNotFoundError:
        raise SAEError(f"{path}: missing; copy the weights beside their config") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise SAEError(f"{path}: not a whole file ({error}); copy it again") from None


def npz_arrays(path: Path) -> Arrays:
    """The arrays of an npz file; compressed entries are read, others mapped."""
    arrays = {}
    for name, entry in zip_entries(path).items():
        try:
            with zipfile.ZipFile(path) as archive, archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = header(file)
                begin = file.tell()
                if entry.compress_type != zipfile.ZIP_STORED:
                    file.seek(0)
                    arrays[name.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
                    continue
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            raise SAEError(f"{path}: {name} cannot be read ({error}); copy it again") from None
        if dtype.hasobject:
            raise SAEError(f"{path}: {name} holds Python objects, which are not read")
        array = mapped(path, dtype, stored_at(path, entry) + begin, shape[::-1] if fortran else shape)
        arrays[name.removesuffix(".npy")] = array.T if fortran else array
    return arrays


class _Storage:
    """A tensor's memory inside the zip file, before its shape is known."""

    def __init__(self, dtype: Any, key: str, count: int):
        self.dtype, self.key, self.count = dtype, key, count


class _Tensors(pickle.Unpickler):
    """Understands what torch.save writes of tensors, numbers, strings and containers of them, and nothing else."""

    def __init__(self, data: bytes, path: Path, prefix: str, entries: dict[str, zipfile.ZipInfo]):
        super().__init__(io.BytesIO(data))
        self.path, self.prefix, self.entries = path, prefix, entries

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            return self.tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *rest: data
        if (module, name) in (("collections", "OrderedDict"), ("builtins", "dict")):
            return dict
        if module == "torch" and name in TORCH_STORAGES:
            return TORCH_STORAGES[name]
        if module == "torch" and name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool"):
            return name
        if (module, name) == ("torch", "Size"):
            return tuple
        raise SAEError(f"{self.path}: holds a {module}.{name}, which is no tensor and is not run; save its state_dict instead")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise SAEError(f"{self.path}: holds a {kind!r}, which is no tensor")
        return _Storage(dtype, key, count)

    def tensor(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
        entry = self.entries.get(f"{self.prefix}data/{storage.key}")
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise SAEError(f"{self.path}: the data of tensor {storage.key} is missing; copy it again")
        whole = mapped(self.path, storage.dtype, stored_at(self.path, entry), (storage.count,))
        reach = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if 0 not in size else 0
        if offset < 0 or min(stride, default=0) < 0 or reach > storage.count:
            raise SAEError(f"{self.path}: tensor {storage.key} reaches beyond its data; copy it again")
        steps = tuple(s * whole.itemsize for s in stride)
        return np.lib.stride_tricks.as_strided(whole[offset:], size, steps, writeable=False)


def torch_object(path: Path) -> Any:
    """What torch.save wrote to a file (its zip form, of PyTorch 1.6 and later), tensors as memory-mapped arrays.

    Raises SAEError for other files and for anything in it but tensors, numbers, strings and their containers.
    """
    entries = zip_entries(path)
    names = [name for name in entries if name.endswith("data.pkl")]
    if len(names) != 1:
        raise SAEError(f"{path}: not a file of torch.save (its zip form); load it there and save its state_dict anew")
    with zipfile.ZipFile(path) as archive:
        data = archive.read(names[0])
    try:
        return _Tensors(data, path, names[0].removesuffix("data.pkl"), entries).load()
    except SAEError:
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise SAEError(f"{path}: cannot be read ({error!r}); copy it again") from None


def state_dict(path: Path, inside: Iterable[str] = ("state_dict", "sae", "model")) -> dict[str, Any]:
    """The named tensors and plain values of a torch file, also where they lie under one of the names `inside`."""
    found = torch_object(path)
    for name in inside:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict):
        raise SAEError(f"{path}: holds a {type(found).__name__}, not the named tensors of a dictionary")
    return found
