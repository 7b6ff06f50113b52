"""AgentIF's rows as published: a list of instructions with their constraints, and result files, which hold outputs and scores beside them.

The public files have dirty spots: keys that are misspelt ("is meta", "is_meat", "other info"), types that are a text, a list, a list of two or
an empty list, the same instruction twice, gates with nothing behind them, code that is no Python. All are read, and counted by name in
`Rows.notes`. What cannot be read is a UserError with file, line and field; where it is a constraint's evaluation, which a table of stored
scores does without, the constraint is `unreadable`, and whoever evaluates raises.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from jaxrl_llm.data.readers import Record, parse_records, read_records
from jaxrl_llm.errors import UserError, from_os_error, nearest
from jaxrl_llm.rewards.text_measures import count_words

GATE, LLM, CODE = "llm_conditional_check", "llm", "code"
SHORT = {GATE: "cond", LLM: "llm", CODE: "code"}
# The eight sequences of the published rows; any other of these steps is evaluated alike.
SEQUENCES = ("llm", "code", "cond-llm", "llm-code", "cond-code", "llm-llm", "cond", "cond-llm-code")
DIMENSIONS = ("unconditional", "conditional", "example_driven")
TYPES = ("formatting", "semantic", "resource")
FUNCTION = "check_following"
NOTHING = object()  # in place of a score that a file does not hold
RESULTS = "results.json"  # of a zip of results, the member that is read
MISSPELT = {"is_meta": ("is meta", "is_meat"), "other_info": ("other info",)}


@dataclass(frozen=True)
class Step:
    """One step of an evaluation: kind is GATE, LLM or CODE; text the question (with {response} where the text goes) or the code."""

    kind: str
    text: str


@dataclass(frozen=True)
class Constraint:
    """One constraint. where: file, line and place, for messages. types: none, one or several. meta_published: by the key as it should be spelt,
    which alone the published code reads. score: NOTHING where the file has none. broken: why no response can be judged by it, "" where one can;
    unreadable: it is for its evaluation's form, which a person can mend.
    """

    where: str
    desc: str
    dimension: str
    types: tuple[str, ...]
    meta: bool
    meta_published: bool
    steps: tuple[Step, ...]
    score: Any = NOTHING
    llm_output: str | None = None
    broken: str = ""
    unreadable: bool = False

    @property
    def sequence(self) -> str:
        """Such as "cond-llm-code"."""
        return "-".join(SHORT[step.kind] for step in self.steps) or "none"

    @property
    def gated(self) -> bool:
        """Whether a condition must be met first."""
        return bool(self.steps) and self.steps[0].kind == GATE

    @property
    def executes(self) -> bool:
        """Whether its code runs text as a program, by exec: that of a response, or of an extract of one."""
        return any(step.kind == CODE and "exec(" in step.text for step in self.steps)


@dataclass(frozen=True)
class Row:
    """One instruction. index: its place in the file, from 0; key: a hash of its input, which duplicates share. output: the response as stored,
    None where there is none. words: of the whole input, Chinese and Japanese by the character. raw: the row as it was read."""

    where: str
    index: int
    name: str
    agent: str
    messages: tuple[Mapping[str, str], ...]
    constraints: tuple[Constraint, ...]
    output: str | None
    key: str
    words: int
    raw: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def scored(self) -> bool:
        """Whether the file holds a score for some constraint, null counted."""
        return any(constraint.score is not NOTHING for constraint in self.constraints)


class Rows(list[Row]):
    """Rows; notes: dirty spots by name; skipped: rows that on_bad="skip" left out, with their reasons."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: Counter[str] = Counter()
        self.skipped: list[str] = []


def read_agentif(source: str, *, limit: int | None = None, on_bad: str = "error") -> Rows:
    """The rows of a file: json or jsonl (also .gz), a zip of results (its results.json), or whatever else `read_records` reads.

    on_bad: "error" stops at a row that cannot be read, "skip" leaves it out and keeps the reason.
    Raises UserError naming file, line and field; no row at all; a zip without results.json or with several.
    """
    rows = Rows()
    for record in _records(source):
        if limit is not None and len(rows) >= limit:
            break
        try:
            if record.problem:
                raise UserError(f"{record.where}: {record.problem}")
            rows.append(parse_row(record.columns, record.where, len(rows), rows.notes))
        except UserError as error:
            if on_bad == "error":
                raise
            rows.skipped.append(str(error))
    if not rows:
        raise UserError(f"{source} holds no row that can be read" + (f"; the first problem: {rows.skipped[0]}" if rows.skipped else ""))
    rows.notes["input that another row has too"] = len(rows) - len({row.key for row in rows})
    return rows


def parse_row(raw: Mapping[str, Any], where: str, index: int, notes: Counter[str]) -> Row:
    """One row. notes: dirty spots are counted there. Raises UserError naming the field."""
    messages = _messages(raw, where)
    entries = raw.get("constraints")
    if not isinstance(entries, list):
        raise _problem(where, "constraints", entries, "a list of constraints", raw)
    if not entries:
        notes["row without constraints"] += 1
    constraints = tuple(_constraint(entry, f"{where}: constraints[{i}]", notes) for i, entry in enumerate(entries))
    parts = [str(raw[key]) for key in ("domain", "query_id", "turn_id", "prompt_type") if raw.get(key) is not None]
    name = str(raw["id"]) if raw.get("id") is not None else "/".join(parts) or str(index)
    text = json.dumps([[message["role"], message["content"]] for message in messages])
    return Row(
        where, index, name, str(raw.get("agent_name") or ""), messages, constraints, _output(raw, where, notes),
        hashlib.sha256(text.encode()).hexdigest()[:16], sum(count_words(message["content"]) for message in messages), raw,
    )  # fmt: skip


def _messages(raw: Mapping[str, Any], where: str) -> tuple[Mapping[str, str], ...]:
    value = raw.get("input")
    if not isinstance(value, list) or not value:
        raise _problem(where, "input", value, "a list of messages", raw)
    messages = []
    for i, message in enumerate(value):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            content = "".join(part["text"] for part in content)  # the API's other way to write a text
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not isinstance(content, str):
            raise _problem(where, f"input[{i}]", message, "a message with the texts role and content")
        messages.append({"role": message["role"], "content": content})
    return tuple(messages)


def _output(raw: Mapping[str, Any], where: str, notes: Counter[str]) -> str | None:
    value = raw.get("output")
    if isinstance(value, Mapping):
        if "content" not in value:
            raise _problem(where, "output.content", None, "the response's text", value)
        value = value["content"]
    if value is None:
        return None
    if not isinstance(value, str):
        raise _problem(where, "output", value, 'a text, or {"content": text, ...}')
    if not value.strip():
        notes["blank output"] += 1
    return value


def _constraint(entry: Any, where: str, notes: Counter[str]) -> Constraint:
    if not isinstance(entry, Mapping):
        raise _problem(where, "", entry, "an object")
    spelt = {}
    for right, wrongs in MISSPELT.items():
        spelt[right] = entry.get(right)
        for wrong in wrongs:
            if entry.get(wrong) is not None:
                notes[f"key {wrong!r} for {right!r}"] += 1
                spelt[right] = entry[wrong] if spelt[right] is None else spelt[right]
    if not isinstance(spelt["is_meta"], (bool, type(None))):
        notes[f"is_meta that is a {type(spelt['is_meta']).__name__}"] += 1
    dimension = entry.get("dimension")
    if not isinstance(dimension, str) or not dimension:
        raise _problem(where, "dimension", dimension, f"one of {', '.join(DIMENSIONS)}", entry)
    if dimension not in DIMENSIONS:
        notes[f"dimension {dimension!r}"] += 1
    llm_output = entry.get("llm_output")
    if llm_output is not None and not isinstance(llm_output, str):
        raise _problem(where, "llm_output", llm_output, "a text")
    score = entry.get("score", NOTHING)
    if score is not NOTHING and not isinstance(score, (bool, type(None))):
        notes[f"score of another kind: {type(score).__name__}"] += 1
    unreadable = False
    try:
        steps = _steps(entry, where)
        broken = _broken(steps)
    except UserError as error:
        steps, broken, unreadable = (), str(error), True
    if broken:
        notes["constraint that cannot be checked"] += 1
    return Constraint(
        where, str(entry.get("desc") or ""), dimension, _types(entry, where, notes), bool(spelt["is_meta"]), bool(entry.get("is_meta", False)),
        steps, score, llm_output, broken, unreadable,
    )  # fmt: skip


def _types(entry: Mapping[str, Any], where: str, notes: Counter[str]) -> tuple[str, ...]:
    value = entry.get("type")
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        notes[f"type that is {('an empty list', 'a list of one', 'a list of two')[len(value)] if len(value) < 3 else 'a longer list'}"] += 1
        found = tuple(value)
    elif isinstance(value, str):
        found = (value,)
    else:
        raise _problem(where, "type", value, f"one of {', '.join(TYPES)}, or a list of them", entry)
    for part in found:
        if part not in TYPES:
            notes[f"type {part!r}"] += 1
    return found


def _steps(entry: Mapping[str, Any], where: str) -> tuple[Step, ...]:
    value = entry.get("evaluation")
    if not isinstance(value, list) or not value:
        raise _problem(where, "evaluation", value, "a list of one step or more", entry)
    steps = []
    for i, step in enumerate(value):
        place = f"evaluation[{i}]"
        if not isinstance(step, Mapping):
            raise _problem(where, place, step, "an object with type and exec")
        if step.get("type") not in SHORT:
            raise _problem(where, f"{place}.type", step.get("type"), f"one of {', '.join(SHORT)}", step)
        if not isinstance(step.get("exec"), str) or not step["exec"].strip():
            raise _problem(where, f"{place}.exec", step.get("exec"), "a text", step)
        steps.append(Step(step["type"], step["exec"]))
    if any(step.kind == GATE for step in steps[1:]):
        raise _problem(where, "evaluation", [SHORT[step.kind] for step in steps], "a sequence whose gate stands first")
    return tuple(steps)


def _broken(steps: Sequence[Step]) -> str:
    """Why no response can satisfy or violate a constraint: its code is no Python, or defines no check; or nothing follows its gate."""
    if steps[-1].kind == GATE:
        return "nothing follows the condition"
    return next((problem for step in steps if step.kind == CODE and (problem := _code_problem(step.text))), "")


@functools.cache
def _code_problem(code: str) -> str:
    try:
        with warnings.catch_warnings():  # of escapes in texts that are not ours
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        return f"its code is no Python ({getattr(error, 'msg', None) or error}{line})"
    defined = any(isinstance(node, ast.FunctionDef) and node.name == FUNCTION for node in tree.body)
    return "" if defined else f"its code defines no {FUNCTION}"


def _problem(where: str, place: str, value: Any, wanted: str, among: Mapping[str, Any] | None = None) -> UserError:
    place = f"{where}{'.' if ']' in where.rpartition(': ')[2] else ': '}{place}" if place else where
    name = place.rpartition(".")[2].rpartition(": ")[2]
    if value is None and among is not None and name not in among:
        return UserError(f"{place} is missing; it must be {wanted}; {nearest(name, among)}")
    return UserError(f"{place} is {' '.join(repr(value).split()):.60}; it must be {wanted}")


def _records(source: str) -> Iterator[Record]:
    path = Path(source).expanduser()
    if path.suffix != ".zip" or not path.is_file():
        return read_records(source)
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if not name.startswith("__MACOSX")]
            members = [name for name in inside if PurePosixPath(name).name == RESULTS]
            if len(members) != 1:
                told = f"has {len(members)} files {RESULTS}" if members else f"has no {RESULTS}: {nearest(RESULTS, inside)}"
                raise UserError(f"{path} {told}; unpack it and name the file")
            data = archive.read(members[0])
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, zlib.error) as error:
        raise UserError(f"{path} is not a whole zip file ({error}): fetch it again") from error
    except OSError as error:
        raise from_os_error(error, path, "read") from error
    return parse_records(path / members[0], data, ".json")


def with_results(row: Row, output: str | None, model: str, verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row in the schema of the published result files, which `read_agentif` reads again: `output`, and `score` and `llm_output` of each
    constraint. verdicts: of each constraint, its score (true, false or null; absent: none) and llm_output, where it has one."""
    raw = json.loads(json.dumps(row.raw))
    raw["constraints"] = [
        {key: value for key, value in constraint.items() if key not in ("score", "llm_output")} | dict(verdict)
        for constraint, verdict in zip(raw["constraints"], verdicts, strict=True)
    ]
    if output is not None:
        raw["output"] = {"content": output, "model_name": model}
    return raw
