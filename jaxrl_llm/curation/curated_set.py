"""The curated set: the input rows, what curation found out about each, and where it all came from.

One set, three layouts that other programs read without this package:

    FOLDER/curated.parquet   a table (pandas, TRL, verl)
    FOLDER/hf_dataset/       datasets.load_from_disk
    FOLDER/array_record/     tfds.builder_from_directory(...).as_data_source("train"), no TensorFlow needed (grain, tunix)
    FOLDER/manifest.json     hashes of data, model and SAE, the config, versions; written last

Every input column stays. One that bears the name of a signal is kept as `input_<name>`. A column whose values have no one
type, or are nested, or may be missing where the layout has no word for that, is written as JSON text, and so is, in the
ArrayRecord layout, whose floats have 32 bits, a column of other floats; the manifest's `columns` says which, and `read` undoes
it. Signals are rounded to 32 bits, so that they are the same everywhere.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.curation.processes import is_writer
from jaxrl_llm.errors import UserError, from_os_error
from jaxrl_llm.run_dir import to_plain, write_json

SIGNALS = {"cluster": np.int64, "difficulty": np.float64, "quality": np.float64, "keep": np.bool_, "order": np.int64}
FORMATS = ("parquet", "hf_dataset", "array_record")
KINDS = {bool: "bool", int: "int", float: "float", str: "text"}
DATASET_NAME = "curated"
ROWS_PER_SHARD = 65_536


@dataclass(frozen=True)
class CuratedSet:
    """rows: the input rows, each with a text "id" and "prompt". Per row, [N]: cluster int; difficulty in [0, 1], the expected
    fail rate (higher is harder); quality, higher is better; keep; order, the place in the curriculum, 0.. over the kept rows
    and -1 for dropped ones. manifest: JSON values.

    Raises UserError for arrays of another length, a difficulty outside [0, 1], or orders that are no permutation.
    """

    rows: list[dict[str, Any]]
    cluster: np.ndarray
    difficulty: np.ndarray
    quality: np.ndarray
    keep: np.ndarray
    order: np.ndarray
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, dtype in SIGNALS.items():
            value = np.asarray(getattr(self, name))
            value = (value.astype(np.float32) if dtype is np.float64 else value).astype(dtype)
            object.__setattr__(self, name, value)
            if value.shape != (len(self.rows),):
                raise UserError(f"curated set: {len(self.rows)} rows, but {name} has shape {value.shape}")
        if not ((self.difficulty >= 0) & (self.difficulty <= 1)).all():
            raise UserError("curated set: difficulty must lie in [0, 1]")
        if sorted(self.order[self.keep]) != list(range(int(self.keep.sum()))) or (self.order[~self.keep] != -1).any():
            raise UserError("curated set: order must number the kept rows 0, 1, 2, ... and be -1 for dropped ones")

    def __len__(self) -> int:
        return len(self.rows)

    def curriculum(self) -> list[dict[str, Any]]:
        """The kept rows in their order."""
        kept = np.flatnonzero(self.keep)
        return [self.rows[i] for i in kept[np.argsort(self.order[kept])]]

    def records(self) -> list[dict[str, Any]]:
        """Rows with their signals as columns."""
        renamed = renamed_columns({name for row in self.rows for name in row})
        signals = {name: getattr(self, name).tolist() for name in SIGNALS}
        return [
            {renamed.get(k, k): v for k, v in row.items()} | {name: values[i] for name, values in signals.items()} for i, row in enumerate(self.rows)
        ]

    def write(self, folder: str | os.PathLike[str], formats: Sequence[str] = FORMATS) -> Path:
        """Write the layouts asked for and the manifest; each appears whole or not at all. Returns the folder. Of several processes
        the first one writes; the others return at once."""
        unknown = [f for f in formats if f not in FORMATS]
        if unknown:
            raise UserError(f"curated set: no format {unknown[0]!r}; one of {', '.join(FORMATS)}")
        folder = Path(folder)
        if not is_writer():
            return folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            columns = _Columns.of(self.records())
            manifest = to_plain({**self.manifest, "columns": columns.kinds, "formats": list(formats), "rows": len(self)})
            (folder / "manifest.json").unlink(missing_ok=True)
            for name in formats:
                WRITERS[name](folder, columns, manifest)
            write_json(folder / "manifest.json", manifest)
        except OSError as error:
            raise from_os_error(error, folder, "write the curated set to") from error
        return folder

    @classmethod
    def read(cls, folder: str | os.PathLike[str], format: str | None = None) -> CuratedSet:
        """Read a set back from one of its layouts (the first one there is). Raises UserError where there is none."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
            there = [f for f in manifest["formats"] if format in (None, f)]
        except (OSError, ValueError, KeyError):
            raise UserError(f"{folder} holds no curated set: no readable manifest.json; run curate again, or give its folder") from None
        if not there:
            raise UserError(f"{folder} has no {format!r} layout; it has {', '.join(manifest['formats'])}")
        records = READERS[there[0]](folder, manifest["columns"])
        renamed = {new: old for old, new in renamed_columns(set(manifest["columns"]) - set(SIGNALS), written=True).items()}
        rows = [{renamed.get(k, k): v for k, v in r.items() if k not in SIGNALS and v is not ABSENT} for r in records]
        signals = {name: np.array([r[name] for r in records], dtype) for name, dtype in SIGNALS.items()}
        own = {k: v for k, v in manifest.items() if k not in ("columns", "formats", "rows")}
        return cls(rows=rows, manifest=own, **signals)


ABSENT = object()  # a column that this row does not have


def renamed_columns(names: set[str], written: bool = False) -> dict[str, str]:
    """Input column -> its name in the set, for those that bear a signal's name (`written`: names as they are on disk)."""
    if written:
        return {signal: f"input_{signal}" for signal in SIGNALS if f"input_{signal}" in names}
    taken = [f"input_{signal}" for signal in SIGNALS if f"input_{signal}" in names and signal in names]
    if taken:
        raise UserError(f"curated set: the rows have both {taken[0]!r} and {taken[0][6:]!r}; rename one of them in the field map")
    return {signal: f"input_{signal}" for signal in SIGNALS if signal in names}


@dataclass(frozen=True)
class _Columns:
    """Column name -> plain values of one kind ("text", "int", "float", "bool", or "json" for text that holds JSON)."""

    values: dict[str, list]
    kinds: dict[str, str]

    @classmethod
    def of(cls, records: list[dict[str, Any]]) -> _Columns:
        names = list(dict.fromkeys(name for record in records for name in record))
        values, kinds = {}, {}
        for name in names:
            column = [record.get(name, ABSENT) for record in records]
            types = {type(v) for v in column}
            kinds[name] = KINDS.get(next(iter(types)), "json") if len(types) == 1 and _fits(column) else "json"
            if kinds[name] == "json":
                column = ["" if v is ABSENT else json.dumps(to_plain(v)) for v in column]
            values[name] = column
        return cls(values, kinds)

    def with_short_floats(self) -> _Columns:
        """Columns of floats that 32 bits do not hold exactly become JSON text."""
        long = {
            name
            for name, kind in self.kinds.items()
            if kind == "float" and not np.array_equal(np.float32(self.values[name]), self.values[name], equal_nan=True)
        }
        values = {name: [json.dumps(v) for v in column] if name in long else column for name, column in self.values.items()}
        return _Columns(values, {name: "json" if name in long else kind for name, kind in self.kinds.items()})


def _fits(column: list) -> bool:
    """Whether a column of one type has the values that all layouts know: 64-bit integers, valid Unicode."""
    try:
        if isinstance(column[0], str):
            "".join(column).encode()
        elif isinstance(column[0], int):
            np.array([min(column), max(column)], np.int64)
    except (UnicodeEncodeError, OverflowError):
        return False
    return True


def _records(values: dict[str, list], kinds: dict[str, str]) -> list[dict[str, Any]]:
    decoded = {name: [ABSENT if v == "" else json.loads(v) for v in values[name]] if kind == "json" else values[name] for name, kind in kinds.items()}
    return [dict(zip(decoded, row, strict=True)) for row in zip(*decoded.values(), strict=True)]


def _fresh(path: Path) -> Path:
    """An empty temporary sibling of `path` to write into."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def _replace(temporary: Path, path: Path) -> None:
    """Put `temporary` in the place of `path`, a folder or a file."""
    if path.is_dir():
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)


def _table(columns: _Columns, manifest: dict[str, Any]):
    import pyarrow as pa

    types = {"text": pa.string(), "json": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    schema = pa.schema([(name, types[kind]) for name, kind in columns.kinds.items()])
    return pa.table(columns.values, schema=schema).replace_schema_metadata({"jaxrl_llm": json.dumps(manifest)})


def _write_parquet(folder: Path, columns: _Columns, manifest: dict[str, Any]) -> None:
    import pyarrow.parquet as pq

    temporary = _fresh(folder / "curated.parquet")
    pq.write_table(_table(columns, manifest), temporary)
    _replace(temporary, folder / "curated.parquet")


def _read_parquet(folder: Path, kinds: dict[str, str]) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    table = pq.read_table(folder / "curated.parquet")
    return _records({name: table[name].to_pylist() for name in kinds}, kinds)


def _write_hf(folder: Path, columns: _Columns, manifest: dict[str, Any]) -> None:
    import datasets

    temporary = _fresh(folder / "hf_dataset")
    datasets.disable_progress_bars()
    datasets.Dataset(_table(columns, manifest).replace_schema_metadata(None)).save_to_disk(temporary)
    datasets.enable_progress_bars()
    write_json(temporary / "manifest.json", manifest)
    _replace(temporary, folder / "hf_dataset")


def _read_hf(folder: Path, kinds: dict[str, str]) -> list[dict[str, Any]]:
    import datasets

    data = datasets.load_from_disk(str(folder / "hf_dataset"))
    return _records({name: data[name][:] for name in kinds}, kinds)


def _write_array_record(folder: Path, columns: _Columns, manifest: dict[str, Any]) -> None:
    """ArrayRecord files and tfds's metadata, made with the parts of tfds that need no TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    columns = columns.with_short_floats()
    manifest = {**manifest, "columns": columns.kinds}
    types = {"text": tfds.features.Text(), "json": tfds.features.Text(), "int": np.int64, "float": np.float32, "bool": np.bool_}
    features = tfds.features.FeaturesDict({name: types[kind] for name, kind in columns.kinds.items()})
    temporary = _fresh(folder / "array_record")
    temporary.mkdir()
    template = tfds.core.ShardedFileTemplate(
        data_dir=temporary,
        dataset_name=DATASET_NAME,
        split="train",
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    examples = [dict(zip(columns.values, row, strict=True)) for row in zip(*columns.values.values(), strict=True)]
    shards = [examples[i : i + ROWS_PER_SHARD] for i in range(0, len(examples), ROWS_PER_SHARD)] or [[]]
    size = 0
    for i, shard in enumerate(shards):
        writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=i, num_shards=len(shards))), "group_size:1")
        for example in shard:
            record = features.serialize_example(example)
            # A protobuf map is written in another order by each process, unless told.
            record = tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True)
            size += len(record)
            writer.write(record)
        writer.close()
    split = tfds.core.SplitInfo("train", shard_lengths=[len(s) for s in shards], num_bytes=size, filename_template=template)
    tfds.folder_dataset.write_metadata(data_dir=str(temporary), features=features, split_infos=[split], filename_template=template, check_data=False)
    write_json(temporary / "manifest.json", manifest)
    _replace(temporary, folder / "array_record")


def _read_array_record(folder: Path, kinds: dict[str, str]) -> list[dict[str, Any]]:
    import tensorflow_datasets as tfds

    kinds = json.loads((folder / "array_record" / "manifest.json").read_text())["columns"]
    source = tfds.builder_from_directory(str(folder / "array_record")).as_data_source(split="train")
    plain = {"text": bytes.decode, "json": bytes.decode, "int": int, "float": float, "bool": bool}
    examples = [source[i] for i in range(len(source))]
    return _records({name: [plain[kind](e[name]) for e in examples] for name, kind in kinds.items()}, kinds)


WRITERS = {"parquet": _write_parquet, "hf_dataset": _write_hf, "array_record": _write_array_record}
READERS = {"parquet": _read_parquet, "hf_dataset": _read_hf, "array_record": _read_array_record}
