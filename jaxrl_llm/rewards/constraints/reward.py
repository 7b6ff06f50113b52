"""The reward that judges each response by the constraints in its row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.constraints.table import evaluate, validate
from jaxrl_llm.rewards.verdict import RewardInput, Status, Verdict


def read_constraints(row: Mapping[str, Any], field: str = "constraints") -> list[tuple[str, dict[str, Any]]]:
    """The rules that a data row carries, as (name, kwargs) pairs.

    The field holds a list of {"name": ..., "kwargs": {...}}, or the same as JSON text (as tables keep it); IFEval's own two columns,
    `instruction_id_list` and `kwargs`, are read where the field is absent. A row without rules gives an empty list.
    Raises UserError naming the row for anything else, and for unknown rules or parameters.
    """
    where = f"row {row.get('id', '?')}"
    entries = decode_list(row.get(field), where, field)
    if entries is None and row.get("instruction_id_list") is not None:
        rule_names = list(row["instruction_id_list"])
        parameters = decode_list(row.get("kwargs"), where, "kwargs") or [{}] * len(rule_names)
        if len(parameters) != len(rule_names):
            raise UserError(f"{where}: {len(rule_names)} entries in 'instruction_id_list' but {len(parameters)} in 'kwargs'")
        entries = [{"name": name, "kwargs": kwargs} for name, kwargs in zip(rule_names, parameters, strict=True)]
    pairs = []
    for entry in entries or []:
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise UserError(f'{where}: field {field!r} must hold a list of {{"name": ..., "kwargs": {{...}}}}, got {entry!r}')
        kwargs = decode_json(entry.get("kwargs"), where, field) or {}
        pairs.append((entry["name"], validate(entry["name"], kwargs, where)))
    return pairs


def decode_list(value: Any, where: str, field: str) -> list | None:
    """A row's column that holds a list, or one as JSON text; None where it is absent. Raises UserError naming row and column."""
    value = decode_json(value, where, field)
    if value is None:
        return None
    if isinstance(value, Mapping) or not hasattr(value, "__iter__"):
        raise UserError(f"{where}: field {field!r} must hold a list, got {value!r}")
    return list(value)


def decode_json(value: Any, where: str, field: str) -> Any:
    """The value of a row's column, read where it is JSON text. Raises UserError naming row and column."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(f"{where}: field {field!r} is not JSON ({error})") from None


class ConstraintsReward:
    """Judges each response by the rules in its row.

    reduce: "all" scores 1 where every rule holds, else 0; "mean" scores the share of rules that hold. PASS means every rule in both.
    include_prompt: check prompt and response as one text (a story from its opening on), not the response alone.
    field: the row's field that holds the rules.
    """

    def __init__(self, reduce: str = "all", include_prompt: bool = False, field: str = "constraints"):
        if reduce not in ("all", "mean"):
            raise UserError(f"reward constraints: reduce is {reduce!r}; it must be 'all' or 'mean'")
        self.reduce, self.include_prompt, self.field = reduce, include_prompt, field

    def __call__(self, inputs: Sequence[RewardInput]) -> list[Verdict]:
        """One verdict an input. A row without rules is NOT_APPLICABLE, a rule whose condition is not met counts for nothing, and one that
        cannot be checked makes the verdict an ERROR (or a TIMEOUT)."""
        return [self._judge(item) for item in inputs]

    def validate_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises UserError for the first row whose rules are unknown or ill-formed: to be called before a run starts."""
        for row in rows:
            read_constraints(row, self.field)

    def _judge(self, item: RewardInput) -> Verdict:
        text = item.prompt + item.response if self.include_prompt else item.response
        verdicts = [evaluate(name, text, kwargs) for name, kwargs in read_constraints(item.row, self.field)]
        if not verdicts:
            return Verdict(Status.NOT_APPLICABLE, reason="the row has no constraints")
        verdicts = [verdict for verdict in verdicts if verdict.status is not Status.NOT_APPLICABLE]
        if not verdicts:
            return Verdict(Status.NOT_APPLICABLE, reason="no constraint's condition is met")
        undecided = [verdict for verdict in verdicts if verdict.value is None]
        if undecided:
            return Verdict(undecided[0].status, reason=undecided[0].reason)
        failed = [verdict for verdict in verdicts if verdict.status is Status.FAIL]
        score = 1 - len(failed) / len(verdicts) if self.reduce == "mean" else None
        if failed:
            return Verdict(Status.FAIL, score, "; ".join(verdict.reason for verdict in failed))
        return Verdict(Status.PASS, score, f"all {len(verdicts)} constraints hold")
