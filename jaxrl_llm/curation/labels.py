"""Difficulty labels: a column of the data, something counted in one, or pass rates of the policy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.curation.processes import from_first, is_writer
from jaxrl_llm.errors import UserError, from_os_error, nearest
from jaxrl_llm.run_dir import _repair_last_line, read_jsonl

STEP = re.compile(r"<<[^<>]*>>")  # one calculation of a GSM8K solution


def labels_from_rows(rows: Sequence[Mapping[str, Any]], expression: str) -> np.ndarray:
    """[N] labels, NaN where a row has none. expression: a column of numbers (also "Level 3" or "3/5": the first number counts), or
    "steps:COLUMN", the number of <<...>> calculations in a text column. Raises UserError for a column that no row has, or that
    holds no number."""
    kind, colon, name = expression.rpartition(":")
    if colon and kind != "steps":
        raise UserError(f"label {expression!r}: give a column, or steps:COLUMN")
    if not any(name in row for row in rows):
        known = sorted({key for row in rows[:100] for key in row})
        raise UserError(f"label {expression!r}: no row has a column {name!r}; {nearest(name, known)}")
    if kind == "steps":
        values = [len(STEP.findall(row[name])) if isinstance(row.get(name), str) and row[name].strip() else np.nan for row in rows]
    else:
        values = [_number(row.get(name)) for row in rows]
    labels = np.array(values, dtype=np.float64)
    if not np.isfinite(labels).any():
        raise UserError(f"label {expression!r}: no row has a number there")
    return labels


def told_sound(labels: np.ndarray) -> np.ndarray | None:
    """[N] labels of two values as 1 (the higher one: fit to train on), 0 and NaN (unlabelled); None where they have more or fewer."""
    levels = np.unique(labels[np.isfinite(labels)])
    return np.where(np.isfinite(labels), labels == levels[-1], np.nan) if len(levels) == 2 else None


def _number(value: Any) -> float:
    if isinstance(value, str):
        found = re.search(r"-?\d+(?:\.\d+)?", value)
        return float(found.group()) if found else np.nan
    return float(value) if isinstance(value, (int, float)) else np.nan


def pass_rates(
    rows: Sequence[Mapping[str, Any]],
    indices: np.ndarray,
    roll_out: Callable[[list[Mapping[str, Any]], int], list[list[Any]]],
    *,
    path: Path | None = None,
    batch_prompts: int = 32,
    progress: Callable[[int], None] = lambda rows: None,
) -> tuple[np.ndarray, int]:
    """([N] share of passes, NaN where not rolled out or nothing could be judged; verdicts that were errors).

    roll_out(rows, place of the first one in `indices`) gives the verdicts of each row's samples. path: a jsonl file of what is
    done, one line a row, so that a stopped run goes on. Several processes call with the same rows; the first one reads and writes it.
    """
    rates, errors = np.full(len(rows), np.nan), 0
    done = _done_before(path, [rows[i]["id"] for i in indices]) if path else {}
    for start in range(0, len(indices), batch_prompts):
        batch = indices[start : start + batch_prompts]
        # The whole batch again where a stop fell inside it: its noise goes by place, and a run that goes on must end as one that never stopped.
        missing = {i for i in batch if rows[i]["id"] not in done}
        verdicts = roll_out([rows[i] for i in batch], start) if missing else [[]] * len(batch)
        for i, found in zip(batch, verdicts, strict=True):
            if i not in missing:
                continue
            judged = [v.value for v in found if v.value is not None]
            entry = {"id": rows[i]["id"], "rate": float(np.mean(judged)) if judged else None, "errors": len(found) - len(judged)}
            done[entry["id"]] = entry
            if path and is_writer():
                _append(path, entry)
        for i in batch:
            entry = done[rows[i]["id"]]
            rates[i] = np.nan if entry["rate"] is None else entry["rate"]
            errors += entry["errors"]
        progress(len(batch))
    return rates, errors


def _done_before(path: Path, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The entries of `ids` that the file holds: all processes must leave out the same rows, so the first one's word goes."""
    found = {}
    if is_writer():
        try:
            _repair_last_line(path)
        except OSError as error:
            raise from_os_error(error, path, "write pass rates to") from error
        found = {entry["id"]: entry for entry in read_jsonl(path)}
    table = np.full((len(ids), 2), np.nan)  # rate (NaN = none), errors (NaN = the row is not done)
    for line, entry in zip(table, map(found.get, ids), strict=True):
        if entry is not None:
            line[:] = np.nan if entry["rate"] is None else entry["rate"], entry["errors"]
    lines = zip(ids, from_first(table), strict=True)
    return {i: {"id": i, "rate": None if np.isnan(r) else float(r), "errors": int(n)} for i, (r, n) in lines if np.isfinite(n)}


def _append(path: Path, entry: dict[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
    except OSError as error:
        raise from_os_error(error, path, "write pass rates to") from error


def policy_roll_out(
    cfg: Any,
    params: Any,
    tokenizer: Any,
    reward: Any,
    *,
    samples: int,
    template: str = "none",
    max_prompt_tokens: int = 512,
    seed: int = 0,
    **generation: Any,
) -> Callable[[list[Mapping[str, Any]], int], list[list[Any]]]:
    """A `roll_out` for `pass_rates`: `samples` completions a prompt by models.generate, judged by `reward`. Prompts longer than
    `max_prompt_tokens` keep their end. generation: its arguments; `mesh` where `params` are on one."""
    import jax

    import models
    from jaxrl_llm.data.prompts import tokenise_prompts
    from jaxrl_llm.rewards import registry
    from jaxrl_llm.rewards.verdict import RewardInput
    from models.sharding import rows_of_all

    def roll_out(rows: list[Mapping[str, Any]], first: int) -> list[list[Any]]:
        prompts = tokenise_prompts(rows, tokenizer, max_length=max_prompt_tokens, template=template, overflow="truncate")
        # Noise by a row's place among those asked for, so that the size of a batch changes no sample.
        how = dict(num_samples=samples, tokenizer=tokenizer, seed=jax.random.key(seed), first_prompt=first)
        rollout = models.generate(cfg, params, prompts.token_lists(), **how, **generation)
        texts = tokenizer.batch_decode(rollout.completions(), skip_special_tokens=True)
        inputs = [
            RewardInput(rows[group]["prompt"], text, rows[group].get("answer"), dict(rows[group]))
            for group, text in zip(rollout.group_ids_N, texts, strict=True)
        ]
        judged = registry.score_shared(reward, inputs, jax.process_index(), jax.process_count(), rows_of_all)
        verdicts: list[list[Any]] = [[] for _ in rows]
        for group, verdict in zip(rollout.group_ids_N, judged, strict=True):
            verdicts[group].append(verdict)
        return verdicts

    return roll_out
