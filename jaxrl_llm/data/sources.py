"""Rows from anywhere: read, rename the fields, check each row, give each an id.

rows = read_rows("train.jsonl", {"prompt": "question"})
rows = read_rows("openai/gsm8k:main", {"prompt": "question"}, split="train", limit=100)
"""

import hashlib
import re
import string
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.data.readers import Record, read_records
from jaxrl_llm.errors import UserError, nearest


class Rows(list[dict[str, Any]]):
    """A list of rows; `skipped` counts, by reason, the rows that on_bad="skip" left out; `places` says where each id stands."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: Counter[str] = Counter()
        self.places: dict[str, str] = {}


def read_rows(
    source: str,
    fields: Mapping[str, str | None] | None = None,
    *,
    split: str = "train",
    limit: int | None = None,
    required: tuple[str, ...] = ("prompt",),
    on_bad: str = "error",
    separator: str | None = None,
) -> Rows:
    """Reads rows, each a dict with a text "id", a text "prompt", maybe an "answer", and every other column of the source.

    Args:
      source: jsonl, json, csv, tsv, parquet or txt file (also .gz), a folder of `datasets.save_to_disk`, a hub id
        ("org/name" or "org/name:subset"), or "tfds:NAME".
      fields: our name -> the source's name: {"prompt": "problem"} renames. A source name with braces is a format over the
        columns: {"prompt": "{Body}. {Question}"}. {"id": None} ignores a column of ids that are not one a row.
      split: for data sets that have splits.
      limit: at most so many rows.
      required: columns that every row must have; texts among them must not be blank.
      on_bad: "error" stops at the first bad row; "skip" leaves bad rows out and counts them in `.skipped`.
      separator: the line between two records of a txt file (a blank line where it is None).

    A prompt that is a list of chat messages stays in "messages", and "prompt" becomes their text. A row without an id gets a
    hash of its prompt and answer, so that the id stays when rows are filtered or re-ordered; a repeat of it gets "-2", "-3".

    Raises:
      UserError: names file:line (or row) and field: malformed row, non-UTF-8 text, blank or missing field (with the nearest
        there is), two rows of one id (both lines), no row at all; a limit below 1.
    """
    if on_bad not in ("error", "skip"):
        raise UserError(f"on_bad '{on_bad}': {nearest(on_bad, ['error', 'skip'])}")
    if limit is not None and limit < 1:
        raise UserError(f"limit {limit}: give the number of rows to read, or None for all")
    rows, hashes = Rows(), Counter()
    seen = rows.places
    for record in read_records(source, split=split, separator=separator):
        if limit is not None and len(rows) >= limit:
            break
        try:
            row = _row(record, fields or {}, required)
            if "id" in row:
                if row["id"] in seen:
                    raise _BadRow(
                        "duplicate id",
                        f"{record.where}: id '{row['id']}' stands already at {seen[row['id']]}: make ids unique, or set the field "
                        "map's id to None to have them made",
                    )
            else:
                row = {"id": _made_id(row, hashes), **row}
                while row["id"] in seen:  # another row was given this very id
                    row["id"] += "-"
            seen[row["id"]] = record.where
        except _BadRow as bad:
            if on_bad == "error":
                raise UserError(str(bad)) from None
            rows.skipped[bad.reason] += 1
            continue
        rows.append(row)
    if not rows:
        skipped = ", ".join(f"{count} {reason}" for reason, count in rows.skipped.items())
        raise UserError(f"{source} holds no row" + (f" that can be used (skipped: {skipped})" if skipped else ""))
    return rows


def parse_fields(text: str) -> dict[str, str | None]:
    """The field map of a config's text: "prompt=question,answer=answer", "prompt={Body}, {Question}", "id=" (none).

    Raises:
      UserError: an entry that is not NAME=COLUMN.
    """
    fields: dict[str, str | None] = {}
    # A comma that is not followed by "name=" belongs to a format.
    for entry in re.split(r",\s*(?=\w+=)", text.strip()) if text.strip() else []:
        ours, equals, theirs = entry.partition("=")
        if not equals or not ours.strip():
            raise UserError(f"field map '{text}': '{entry}' is not NAME=COLUMN, such as prompt=question")
        if "{" in theirs:
            _check_format(text, theirs.strip())
        fields[ours.strip()] = theirs.strip() or None
    return fields


class _BadRow(Exception):
    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def _row(record: Record, fields: Mapping[str, str | None], required: tuple[str, ...]) -> dict[str, Any]:
    if record.problem:
        raise _BadRow("malformed", f"{record.where}: {record.problem}")
    row = _renamed(record, fields)
    if isinstance(row.get("prompt"), list):
        _split_messages(record.where, row)
    for name in required:
        value = row.get(name)
        if name not in row:
            known = nearest(name, record.columns)
            raise _BadRow("missing field", f"{record.where}: no field '{name}': {known}; a field map such as {name}=COLUMN renames")
        if value is None or (isinstance(value, str) and not value.strip()):
            raise _BadRow(f"empty {name}", f"{record.where}: field '{name}' is empty: fill it, or leave such rows out with on_bad=skip")
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise _BadRow("prompt is no text", f"{record.where}: field 'prompt' is a {type(row['prompt']).__name__}, not text")
    if row.get("answer") is not None and not isinstance(row["answer"], str):
        row["answer"] = _answer_text(row["answer"])
    return row


def _renamed(record: Record, fields: Mapping[str, str | None]) -> dict[str, Any]:
    """The columns under our names. A renamed column loses its old name unless a format uses it too."""
    columns = record.columns
    row = {name: value for name, value in columns.items() if name not in fields.values()}
    for ours, theirs in fields.items():
        if theirs is None:
            row.pop(ours, None)
        elif "{" in theirs:
            row[ours] = _formatted(record, theirs)
        elif theirs in columns:
            row[ours] = columns[theirs]
        else:
            raise _BadRow("missing field", f"{record.where}: no field '{theirs}' (wanted as '{ours}'): {nearest(theirs, columns)}")
    for name, value in row.items():
        if isinstance(value, str) and not _encodable(value):
            raise _BadRow("not UTF-8", f"{record.where}: field '{name}' holds half of a surrogate pair, which is no text: mend the file")
    if row.get("id") is not None:
        row["id"] = str(row["id"])
    else:
        row.pop("id", None)
    return row


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_format(text: str, template: str) -> None:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"field map '{text}': the format '{template}' is not whole ({error})") from None
    if any(spec or conversion for _, _, spec, conversion in parts):
        raise UserError(f"field map '{text}': the format '{template}' may hold {{COLUMN}} only, without ':' or '!'")


def _formatted(record: Record, template: str) -> str:
    for _, name, _, _ in string.Formatter().parse(template):
        if name is not None and name not in record.columns:
            raise _BadRow("missing field", f"{record.where}: no field '{name}': {nearest(name, record.columns)}")
    return template.format_map(record.columns)


def _split_messages(where: str, row: dict[str, Any]) -> None:
    messages = row["prompt"]
    if not all(isinstance(entry, dict) and isinstance(entry.get("content"), str) and "role" in entry for entry in messages):
        raise _BadRow("prompt is no text", f"{where}: field 'prompt' is a list, but not of messages with role and content")
    row["messages"] = messages
    row["prompt"] = "\n".join(entry["content"] for entry in messages)


def _answer_text(value: Any) -> str:
    """Answers are compared as text: 51.0 out of a JSON number is the answer 51."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _made_id(row: Mapping[str, Any], hashes: Counter[str]) -> str:
    text = f"{row.get('prompt', '')}\x00{row.get('answer', '')}"
    made = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()
    hashes[made] += 1
    return made if hashes[made] == 1 else f"{made}-{hashes[made]}"
