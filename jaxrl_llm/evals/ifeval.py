"""IFEval on a set of responses (Zhou et al. 2023): four accuracies, by instruction and by prompt, strict and loose, with intervals, and by type.

Verdicts are of `rewards.constraints`, which has lm-eval's but where docs/constraints.md says otherwise. A verdict that makes no statement (a
check that was given up) counts in nothing; so does a prompt without a response, which is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.data.readers import read_records
from jaxrl_llm.data.sources import Rows, read_rows
from jaxrl_llm.errors import UserError
from jaxrl_llm.evals.statistics import bootstrap_sums, share_limits, wilson
from jaxrl_llm.rewards.constraints import check_loose, check_strict, read_constraints
from jaxrl_llm.rewards.verdict import Status, Verdict

WAYS = {"strict": check_strict, "loose": check_loose}
Verdicts = dict[str, list[Verdict]]  # way -> the verdicts of a prompt's instructions, in order


def read_prompts(source: str, fields: Mapping[str, str | None], *, split: str = "train", limit: int | None = None) -> Rows:
    """The prompts; each row has "instructions", its constraints as (name, kwargs). Raises UserError naming the row's place for one that is unknown or
    ill-formed, and for a prompt without any."""
    columns = ("prompt", "instruction_id_list")
    rows = read_rows(source, fields, split=split, limit=limit, required=columns)
    for row in rows:
        try:
            row["instructions"] = read_constraints(row)
        except UserError as error:
            raise UserError(f"{rows.places[row['id']]}: {error}") from None
        if not row["instructions"]:
            raise UserError(f"{rows.places[row['id']]}: field 'instruction_id_list' is empty: a prompt needs an instruction")
    return rows


def read_responses(source: str, fields: Mapping[str, str | None], prompts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{row id: response} of a file of prompts and responses, found by the prompt's text; lm-eval's log of samples is read too.

    Raises UserError: no prompt or response in a line, two different responses to one prompt, a file that answers none of the prompts.
    """
    wanted = {row["prompt"].strip(): row["id"] for row in prompts}
    found: dict[str, str] = {}
    places: dict[str, str] = {}
    for record in read_records(source):
        if record.problem:
            raise UserError(f"{record.where}: {record.problem}")
        prompt, response = _pair(record.columns, fields, record.where)
        row_id = wanted.get(prompt.strip())
        if row_id is None:
            continue
        if found.setdefault(row_id, response) != response:
            raise UserError(f"{record.where}: another response to the prompt of {places[row_id]}: keep one response to a prompt")
        places.setdefault(row_id, record.where)
    if not found:
        raise UserError(f"{source} holds no response to any of the {len(prompts)} prompts: prompts are compared by their text")
    return found


def _pair(columns: Mapping[str, Any], fields: Mapping[str, str | None], where: str) -> tuple[str, str]:
    doc, replies = columns.get("doc"), columns.get("resps")
    if isinstance(doc, Mapping) and isinstance(replies, list):  # lm-eval: one list of replies a request
        reply = replies[0] if replies else None
        columns = {"prompt": doc.get("prompt"), "response": reply[0] if isinstance(reply, list) and reply else reply}
        fields = {}
    pair = []
    for name in ("prompt", "response"):
        value = columns.get(fields.get(name) or name)
        if not isinstance(value, str):
            told = f"is {value!r:.40}" if fields.get(name) or name in columns else "is missing"
            raise UserError(f"{where}: field '{fields.get(name) or name}' {told}; it must be a text; responses.fields renames columns")
        pair.append(value)
    return pair[0], pair[1]


def answer_text(response: str, thinking: str = "drop") -> str:
    """What of a response is judged: with "drop" what follows its reasoning; one that never ends its reasoning has said nothing."""
    if thinking == "keep" or "think>" not in response:
        return response
    _, closed, after = response.rpartition("</think>")
    return after.lstrip() if closed else response.partition("<think>")[0]


def judge(row: Mapping[str, Any], response: str) -> Verdicts:
    """The verdicts of a row's instructions on a response."""
    return {way: [check(name, response, **kwargs) for name, kwargs in row["instructions"]] for way, check in WAYS.items()}


def followed(verdicts: Sequence[Verdict]) -> bool | None:
    """Whether all instructions of a prompt are followed; None where that is not known."""
    if any(verdict.status is Status.FAIL for verdict in verdicts):
        return False
    return True if all(verdict.status is Status.PASS for verdict in verdicts) else None


def figures(judged: Sequence[tuple[Mapping[str, Any], Verdicts]], *, draws: int = 1000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """{"prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose": {value, low, high, passed, counted}}.

    By prompt the interval is Wilson's. Instructions of one prompt stand or fall together, so theirs is of a bootstrap over prompts.
    """
    found = {}
    for way in WAYS:
        told = [followed(verdicts[way]) for _, verdicts in judged]
        found[f"prompt_{way}"] = _proportion(told.count(True), len(told) - told.count(None))
        sums = {
            "passed": np.array([sum(verdict.status is Status.PASS for verdict in verdicts[way]) for _, verdicts in judged], float),
            "counted": np.array([sum(verdict.value is not None for verdict in verdicts[way]) for _, verdicts in judged], float),
        }
        passed, counted = (int(values.sum()) for values in sums.values())
        found[f"instruction_{way}"] = _proportion(passed, counted)
        if counted:
            span = bootstrap_sums(sums, lambda total: {"share": total["passed"] / total["counted"]}, draws=draws, seed=seed)["share"]
            span = share_limits(span, int(np.count_nonzero(sums["counted"])))
            found[f"instruction_{way}"] |= {"low": span.low, "high": span.high}
    return found


def by_type(judged: Sequence[tuple[Mapping[str, Any], Verdicts]]) -> dict[str, dict[str, Any]]:
    """{type: {"strict", "loose": {value, low, high, passed, counted}}}, with Wilson's intervals: a type stands once in a prompt, or nearly so.
    Groups, such as "keywords", stand among them by their name with a colon."""
    counts: dict[str, dict[str, list[int]]] = {}
    for row, verdicts in judged:
        for place, (name, _) in enumerate(row["instructions"]):
            for kind in (name, name.partition(":")[0] + ":"):
                for way in WAYS:
                    verdict = verdicts[way][place]
                    tally = counts.setdefault(kind, {way: [0, 0] for way in WAYS})[way]
                    tally[0] += verdict.status is Status.PASS
                    tally[1] += verdict.value is not None
    return {kind: {way: _proportion(*tally) for way, tally in ways.items()} for kind, ways in sorted(counts.items())}


def _proportion(passed: int, counted: int) -> dict[str, Any]:
    if not counted:
        return {"value": None, "low": None, "high": None, "passed": 0, "counted": 0}
    span = wilson(passed, counted)
    return {"value": span.estimate, "low": span.low, "high": span.high, "passed": passed, "counted": counted}
