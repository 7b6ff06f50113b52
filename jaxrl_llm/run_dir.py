"""The directory of one run: config.json, metrics.jsonl, samples.jsonl, summary.json, checkpoints/.

Whole files are written to a temporary name and renamed, lines are appended and flushed, so a kill at any moment leaves a
directory that the next start can use. Only process 0 of a multi-process run writes.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jaxrl_llm import __version__
from jaxrl_llm.config import config_hash, differences, flat_fields, is_named, says_what, to_dict
from jaxrl_llm.errors import UserError, from_os_error, nearest

HEAD = "config.json"
RUN_CONTROL = ("overwrite", "allow_changes")  # fields about the directory itself: no change of a run
OWN_FILES = ("metrics.jsonl", "samples.jsonl", "summary.json", "report.html", "report.json", "checkpoints")


class RunDir:
    """Opens or makes the directory of a run.

    Args:
      path: the directory (--workdir), on a file system that every host of the job mounts.
      config: the run's config; `config.overwrite = True` clears the directory of another run first, and the run that is there goes on with
        other values of the fields (or groups of them) that `config.allow_changes` names.
      kind: what sort of run this is, such as "grpo".
      owns: names of the files and folders that such a run makes in the directory beside those made here; * stands for anything
        ("pass_rates-*.jsonl"). Overwriting clears them too, since a run takes for its own what it finds there. What neither this
        run nor the one that it replaces owns stays.

    Raises:
      UserError: the directory is a URL, holds another run (another kind, or a config that differs: the key is named) that has left more
        there than its config, holds the config.json of something else, or cannot be written; `allow_changes` names no field. ValueError: a
        name in `owns` that is not directly in the directory.
    """

    def __init__(self, path: str | os.PathLike[str], config: ConfigDict | Mapping[str, Any], *, kind: str, owns: tuple[str, ...] = ()):
        refuse_url(path)
        if not all(map(_is_name, owns)):
            raise ValueError(f"owns={owns}: names of files and folders in the run directory, without slashes")
        self.path = Path(path)
        self.kind = kind
        self.owns = tuple(owns)
        self.checkpoints = self.path / "checkpoints"
        self.is_writer = _process_index() == 0
        self.resumed = False
        self.changes: dict[str, tuple[Any, Any]] = {}  # key -> value in config.json, value now: of a run that goes on
        self._plain = plain = to_plain(to_dict(config))
        _check_named(plain)
        found = self._find(plain)
        if not self.is_writer:
            self.resumed = found
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if plain.get("overwrite") and not found:
                self._clear()
            self.checkpoints.mkdir(exist_ok=True)
            if found:
                for name in ("metrics.jsonl", "samples.jsonl"):
                    _repair_last_line(self.path / name)
            else:
                self._write_head({})
        except OSError as error:
            raise from_os_error(error, self.path, "write the run directory") from error
        self.resumed = found

    def _find(self, plain: dict[str, Any]) -> bool:
        """Whether the directory already holds this very run; raises when it holds another one that is not to be overwritten."""
        head = self._head()
        if head is None:
            return False
        changes, refused, named = differences(head["config"], plain), [], plain.get("allow_changes") or ()
        if head["kind"] == self.kind:
            refused = [key for key in changes if says_what(key, head["config"], plain) and not is_named(key, named)]
            if not refused:
                self.changes = {key: pair for key, pair in changes.items() if key not in RUN_CONTROL}
                return True
        if plain.get("overwrite") or self._untouched():
            return False
        way_out = "choose another --workdir, or set --config.overwrite=True to clear this one"
        if head["kind"] != self.kind:
            raise UserError(f"{self.path} holds a run of '{head['kind']}', this is '{self.kind}': {way_out}")
        old, new = changes[refused[0]]
        told = f"config key '{refused[0]}' is {_short(old)} there and {_short(new)} here"
        if "allow_changes" in plain and all(is_named(key, ("train",)) for key in refused):
            way_out = f"to go on with it as it is here add --config.allow_changes={','.join([*named, *refused])}; else {way_out}"
        raise UserError(f"{self.path} holds another run: {told}; {way_out}")

    def note_changes(self, step: int) -> None:
        """Records that a run which goes on after `step` does so with other settings than before, if it does: in metrics.jsonl as a line of kind
        "change", and in config.json, which has the config as it is now and under "changes" what was. Until then the run counts as the old one.
        """
        if not (self.is_writer and self.changes):
            return
        for key, (old, new) in self.changes.items():
            logging.warning("%s goes on after step %d with %s %s in place of %s", self.path, step, key, _short(new), _short(old))
        record = to_plain({"kind": "change", "step": step, "changed": self.changes})
        if record not in self.metrics():  # a kill here must not double it
            self.log(record)
        head = self._head() or {}
        changes = [*(head.get("changes") or ()), {"after_step": step, "changed": self.changes}]
        self._write_head({name: head[name] for name in ("rows", "start") if name in head} | {"changes": changes})
        self.changes = {}

    def same_rows(self, rows: Mapping[str, str]) -> None:
        """Refuses to go on with other rows than the run that is there began with: its checkpoints and its schedule know them by number.

        rows: name of a set -> `fingerprint` of it. Sets that are new, or no longer there, are not compared.
        Raises UserError naming the set.
        """
        head = self._head() or {}
        if self._has_checkpoints():
            for name, found in rows.items():
                if head.get("rows", {}).get(name, found) != found:
                    raise UserError(
                        f"{self.path}: the rows of '{name}' are not those that this run began with, though its config names the same: give it "
                        "the data as it was, or choose another --workdir"
                    )
        if self.is_writer and head.get("rows", {}) != rows:
            write_json(self.path / HEAD, head | {"rows": rows})

    def same_start(self, start: str) -> None:
        """Refuses to go on from another model than the run that is there began with, where every start reads it anew: a reference, or what
        an adapter is put into, is in no checkpoint.

        start: `fingerprint` of the model. Raises UserError.
        """
        head = self._head() or {}
        if self._has_checkpoints() and head.get("start", start) != start:
            raise UserError(
                f"{self.path}: the model (or adapter) that this run started from has changed since, though its config names the same, and the run "
                "needs it as it was: put it back, or choose another --workdir"
            )
        if self.is_writer and head.get("start") != start:
            write_json(self.path / HEAD, head | {"start": start})

    def _has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    def way_on(self, group: str) -> str:
        """The end of a message that advises other settings of a group of fields: how this run goes on with them."""
        return f", and go on with --config.allow_changes={group}" if "allow_changes" in self._plain else ""

    def _write_head(self, more: Mapping[str, Any]) -> None:
        head = {"kind": self.kind, "hash": config_hash(self._plain), "version": __version__, "owns": self.owns, "config": self._plain}
        write_json(self.path / HEAD, head | more)

    def _untouched(self) -> bool:
        """Whether the run that is there has left nothing but its config: it stopped at a mistake that has been mended since."""
        empty = lambda entry: entry.name == HEAD or (entry == self.checkpoints and not any(entry.iterdir()))  # noqa: E731
        return all(map(empty, self.path.iterdir()))

    def _head(self) -> dict[str, Any] | None:
        """What config.json says of the run that is there; None where there is none, UserError where it is something else's."""
        try:
            head = json.loads((self.path / HEAD).read_text())
            if isinstance(head["config"], dict) and isinstance(head["kind"], str):
                return head
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_os_error(error, self.path, "open the run directory") from error
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{self.path}/{HEAD} is not the config of a run of ours: choose another --workdir, or move that file away")

    def _clear(self) -> None:
        """Removes what the run that is there and this one own. config.json goes last: until then the folder is that run's."""
        head = self._head()
        if head is None:
            return
        theirs = [name for name in head.get("owns") or () if isinstance(name, str) and _is_name(name)]
        for name in dict.fromkeys((*OWN_FILES, *self.owns, *theirs, HEAD)):
            for target in self.path.glob(name):
                if target.is_dir() and not target.is_symlink():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)

    def log(self, record: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl."""
        self._append("metrics.jsonl", record)

    def sample(self, record: Mapping[str, Any]) -> None:
        """Appends one line to samples.jsonl."""
        self._append("samples.jsonl", record)

    def summary(self, record: Mapping[str, Any]) -> None:
        """Writes summary.json anew."""
        if self.is_writer:
            write_json(self.path / "summary.json", record)

    def metrics(self, until: float = math.inf) -> list[dict[str, Any]]:
        """The records of metrics.jsonl so far, of steps up to `until`: beside `truncate_after`, since a process that does not write may read
        the file before it is cut."""
        return [record for record in read_jsonl(self.path / "metrics.jsonl") if record.get("step", 0) <= until]

    def samples(self) -> list[dict[str, Any]]:
        """The records of samples.jsonl so far."""
        return read_jsonl(self.path / "samples.jsonl")

    def truncate_after(self, step: int) -> None:
        """Drops the metric and sample lines of steps after `step`: what a resumed run is about to write again. What changed is not, and stays."""
        if not self.is_writer:
            return
        for name in ("metrics.jsonl", "samples.jsonl"):
            path = self.path / name
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            kept = [line for line in lines if (record := json.loads(line)).get("step", 0) <= step or record.get("kind") == "change"]
            if len(kept) < len(lines):
                write_text(path, "".join(kept))

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if not self.is_writer:
            return
        path = self.path / name
        line = (json.dumps(to_plain(record), ensure_ascii=False) + "\n").encode()
        before = 0
        try:
            with open(path, "ab", buffering=0) as file:
                before = file.tell()
                written = file.write(line)
                while written < len(line):
                    written += file.write(line[written:])
        except OSError as error:
            # A part of the line may be on disk; without it the file stays readable.
            with contextlib.suppress(OSError):
                os.truncate(path, before)
            raise from_os_error(error, path, "write") from error


def fingerprint(parts: Iterable[Any]) -> str:
    """16 hex digits of arrays and JSON values, in order."""
    digest = hashlib.sha256()
    for part in parts:
        array = isinstance(part, np.ndarray)
        text = f"{part.dtype}{part.shape}" if array else json.dumps(to_plain(part), sort_keys=True)
        digest.update(text.encode() + b"\n")
        if array:
            digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()[:16]


# Two letters at least, so that a Windows drive is none; one slash, as pathlib leaves of two.
_URL = re.compile(r"[A-Za-z][\w+.-]+:/")


def refuse_url(path: str | os.PathLike[str]) -> None:
    """Raises UserError for "gs://bucket/run" and its like, of which pathlib would make a local folder "gs:"."""
    if _URL.match(str(path)):
        raise UserError(
            f"workdir '{path}' is a URL, and a run directory is a folder: give --workdir a path that every host mounts "
            "(NFS, or the bucket mounted as a file system), such as --workdir=/mnt/shared/run"
        )


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes JSON to a temporary name beside `path`, then renames it; raises UserError when the disk does not take it."""
    write_text(path, json.dumps(to_plain(value), indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text atomically: the file is either the old one or the whole new one.

    Raises:
      UserError: no space, no permission, or another refusal of the disk; the old file is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise from_os_error(error, path, "write") from error


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a jsonl file of a run; [] where there is none. A last line cut short by a kill is left out."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    if lines[-1] and not _is_record(lines[-1]):
        lines.pop()
    return [json.loads(line) for line in lines if line.strip()]


def to_plain(value: Any) -> Any:
    """JSON values of anything we log: numpy and JAX scalars and arrays become numbers and lists, NaN and infinities None."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [to_plain(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if hasattr(value, "__array__"):
        return to_plain(np.asarray(value).tolist())
    return str(value)


def _repair_last_line(path: Path) -> None:
    """Cuts off a last line that a kill left unfinished; ends it when only the newline is missing."""
    if not path.exists():
        return
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return
    start = data.rfind(b"\n") + 1
    if _is_record(data[start:]):
        with open(path, "ab") as file:
            file.write(b"\n")
    else:
        os.truncate(path, start)


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _is_name(name: str) -> bool:
    """Whether a name, or a pattern of names, stays inside its folder and does not stand for the whole of it."""
    return Path(name).name == name and name.strip("*?.") != ""


def _process_index() -> int:
    # Without JAX there is one process; a tool that only reads and writes rows must not start a backend for this.
    jax = sys.modules.get("jax")
    return jax.process_index() if jax is not None else 0


def _check_named(plain: Mapping[str, Any]) -> None:
    """Raises UserError where `allow_changes` names what is neither a field nor a group of them."""
    known = list(flat_fields(plain))
    for name in plain.get("allow_changes") or ():
        if not any(is_named(key, (name,)) for key in known):
            raise UserError(f"config key 'allow_changes' names '{name}', which is no field: {nearest(name, known)}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
