"""Records out of files and data sets, each with the place it came from.

A reader yields `Record`s: where (such as "rows.jsonl:17"), the columns, and what is wrong with the record when it could not be
read. What a record must hold is not decided here but in `sources`.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxrl_llm.errors import UserError, from_os_error, nearest

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")


class Record(NamedTuple):
    """One record: `where` it stands, its `columns`, or `problem` when it is malformed (columns is then empty)."""

    where: str
    columns: dict[str, Any]
    problem: str | None = None


def read_records(source: str, *, split: str = "train", separator: str | None = None) -> Iterator[Record]:
    """The records of a source, in its order.

    Args:
      source: a file (jsonl, json, csv, tsv, parquet, txt, each also with .gz), a folder that `datasets.save_to_disk` wrote, a
        hub id such as "openai/gsm8k" or "openai/gsm8k:main", or "tfds:NAME" or "tfds:FOLDER".
      split: for data sets that have splits.
      separator: the line between two records of a txt file; a blank line where it is None.

    Raises:
      UserError: no such source, a file that cannot be read as a whole, a split that is not there.
    """
    if source.startswith("tfds:"):
        return _tfds(source.removeprefix("tfds:"), split)
    path = Path(source).expanduser()
    if path.is_dir():
        return _dataset_folder(path, split)
    if path.is_file():
        return _file(path, separator)
    if _looks_like_hub_id(source):
        return _hub(source.removeprefix("hf:"), split)
    raise UserError(f"no such file '{source}': {_nearby(path)}")


def _file(path: Path, separator: str | None) -> Iterator[Record]:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix == ".parquet":
        return _parquet(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}): fetch it again") from error
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    return parse_records(path, data, suffix, separator)


def parse_records(path: Path, data: bytes, suffix: str, separator: str | None = None) -> Iterator[Record]:
    """The records in the bytes of a file (not parquet) that a message calls `path`: of a member of an archive too. Raises as `read_records`."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise UserError(f"{path} is empty")
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl(path, data)
    if suffix == ".json":
        return _json(path, data)
    if suffix in (".csv", ".tsv"):
        return _csv(path, _decode(path, data), "\t" if suffix == ".tsv" else ",")
    if suffix == ".txt":
        return _txt(path, _decode(path, data), separator)
    raise UserError(f"{path}: cannot tell its format from '{suffix}'; one of {', '.join(SUFFIXES)} (and .gz)")


def _jsonl(path: Path, data: bytes) -> Iterator[Record]:
    for number, line in enumerate(data.split(b"\n"), 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Record(where, {}, f"byte {error.start + 1} of the line ({line[error.start]:#04x}) is not UTF-8")
        except ValueError as error:
            yield Record(where, {}, f"not JSON ({error})")
        else:
            yield _object(where, value)


def _json(path: Path, data: bytes) -> Iterator[Record]:
    text = _decode(path, data)
    start = text.lstrip()[:1]
    if start == "[":
        return _json_list(path, text)
    try:
        value = json.loads(text)
    except ValueError as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if start == "{" and len(lines) > 1 and _is_json(lines[0]):
            return _jsonl(path, data)
        line = getattr(error, "lineno", 1)
        raise UserError(f"{path}:{line}: not JSON ({error})") from error
    return _json_object(path, value)


def _json_list(path: Path, text: str) -> Iterator[Record]:
    """The entries of a top-level list one by one, so that each knows its line."""
    decoder = json.JSONDecoder()
    at, line = text.index("[") + 1, text.count("\n", 0, text.index("[") + 1) + 1
    one_line = "\n" not in text.strip()
    expects_entry, count = False, 0
    while True:
        begin = _skip_space(text, at)
        line, at = line + text.count("\n", at, begin), begin
        if text[at : at + 1] == "]" and not expects_entry:
            if text[at + 1 :].strip():
                raise UserError(f"{path}:{line}: something follows the end of the list")
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError as error:
            broken = getattr(error, "lineno", line)
            raise UserError(f"{path}:{broken}: not JSON ({getattr(error, 'msg', error)})") from error
        count += 1
        yield _object(f"{path}: entry {count}" if one_line else f"{path}:{line}", value)
        line, at = line + text.count("\n", at, end), end
        comma = _skip_space(text, at)
        line, at = line + text.count("\n", at, comma), comma
        if text[at : at + 1] == ",":
            at, expects_entry = at + 1, True
        elif text[at : at + 1] == "]":
            expects_entry = False
        else:
            raise UserError(f"{path}:{line}: not JSON (a comma or the end of the list is missing)")


def _json_object(path: Path, value: Any) -> Iterator[Record]:
    """An object that holds the rows: under its one list of objects, as columns of one length, or as a single row."""
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}: rows are a list of objects")
    lists = {key: entry for key, entry in value.items() if isinstance(entry, list)}
    of_objects = {key: entry for key, entry in lists.items() if entry and all(isinstance(row, dict) for row in entry)}
    if len(of_objects) == 1:
        key, rows = next(iter(of_objects.items()))
        return (_object(f"{path}: {key}[{i}]", row) for i, row in enumerate(rows))
    if len(of_objects) > 1:
        raise UserError(f"{path} holds several lists of rows ({', '.join(of_objects)}): keep one to a file")
    lengths = {len(entry) for entry in lists.values()}
    if lists and len(lists) == len(value) and len(lengths) == 1:
        rows = zip(*lists.values(), strict=True)
        return (Record(f"{path}: row {i + 1}", dict(zip(lists, row, strict=True))) for i, row in enumerate(rows))
    if lists and len(lists) == len(value):
        raise UserError(f"{path} holds columns of different lengths: rows are a list of objects, or columns of one length")
    return iter([Record(f"{path}:1", value)])


def _csv(path: Path, text: str, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() or f"column_{i}" for i, name in enumerate(next(reader), 1)]
        begin = reader.line_num + 1
        for fields in reader:
            where, begin = f"{path}:{begin}", reader.line_num + 1
            if not fields:
                continue
            if len(fields) != len(header):
                yield Record(where, {}, f"{len(fields)} fields where the header has {len(header)}")
            else:
                yield Record(where, dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _txt(path: Path, text: str, separator: str | None) -> Iterator[Record]:
    separator = (separator or "").strip()
    begin, block = 1, []
    for number, line in enumerate([*text.split("\n"), separator], 1):
        if line.strip() != separator:
            begin = begin if block else number
            block.append(line.rstrip("\r"))
            continue
        record = "\n".join(block).strip()
        if record:
            yield Record(f"{path}:{begin}", {"prompt": record})
        block = []


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a whole parquet file ({str(error).splitlines()[0]})") from error
    return _parquet_rows(path, file)


def _parquet_rows(path: Path, file: Any) -> Iterator[Record]:
    import pyarrow

    count = 0
    try:
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                count += 1
                yield Record(f"{path}: row {count}", row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: after row {count} the parquet file cannot be read ({str(error).splitlines()[0]}): copy it again") from error


def _dataset_folder(path: Path, split: str) -> Iterator[Record]:
    if not (path / "dataset_dict.json").exists() and not (path / "dataset_info.json").exists():
        raise UserError(f"{path} is a folder, but not one that datasets.save_to_disk wrote: name a file in it; {_nearby(path / 'x')}")
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot read this data set ({str(error).splitlines()[0]})") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(f"{path} has no split '{split}': {nearest(split, [str(name) for name in found])}")
        found = found[split]
    return (Record(f"{path}: row {i}", row) for i, row in enumerate(found, 1))


def _hub(name: str, split: str) -> Iterator[Record]:
    import datasets

    repository, _, subset = name.partition(":")
    try:
        found: Any = datasets.load_dataset(repository, subset or None, split=split)
    except Exception as error:  # the hub client raises many kinds; its first line names the cause
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load data set '{name}', split '{split}', from the hub: {reason}") from error
    return (Record(f"{name}: row {i}", row) for i, row in enumerate(found, 1))


def _tfds(name: str, split: str) -> Iterator[Record]:
    import tensorflow_datasets as tfds

    try:
        if Path(name).expanduser().is_dir():
            builder: Any = tfds.builder_from_directory(str(Path(name).expanduser()))
            found = builder.as_data_source(split=split)
        else:
            found = tfds.data_source(name, split=split)
    except Exception as error:  # tfds raises many kinds; its first line names the cause
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot load 'tfds:{name}', split '{split}': {reason}") from error
    return (_tfds_record(f"tfds:{name}: row {i}", row) for i, row in enumerate(found, 1))


def _tfds_record(where: str, row: Any) -> Record:
    try:
        return Record(where, _text(row))
    except UnicodeDecodeError as error:
        return Record(where, {}, f"not UTF-8 ({error})")


def _text(value: Any) -> Any:
    """tfds gives strings as bytes and numbers as numpy scalars; rows hold Python values."""
    if isinstance(value, dict):
        return {key: _text(entry) for key, entry in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if hasattr(value, "tolist"):
        return _text(value.tolist())
    return [_text(entry) for entry in value] if isinstance(value, list) else value


def _object(where: str, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(where, value)
    return Record(where, {}, f"a {type(value).__name__} where an object with named fields is needed")


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte {error.start + 1} of the file ({data[error.start]:#04x}) is not UTF-8: save the file as UTF-8"
        ) from error


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _looks_like_hub_id(source: str) -> bool:
    if source.startswith("hf:"):
        return True
    stem = source.partition(":")[0]
    local = stem.startswith((".", "/", "~")) or Path(stem.removesuffix(".gz")).suffix in SUFFIXES
    return stem.count("/") == 1 and not local and not Path(stem).parent.exists()


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"there is no folder {folder} either"
    known = [found.name for found in folder.iterdir() if found.is_dir() or found.suffix in (*SUFFIXES, ".gz")]
    return nearest(path.name, known) if known else f"{folder} holds no data file"
