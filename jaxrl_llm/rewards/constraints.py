"""Rules that a response must follow, by name: IFEval's 25 and a few for stories (the table is constraint_rules.py).

>>> check("length_constraints:number_words", "one two three", num_words=3, relation="at least").status
<Status.PASS: 'pass'>
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.errors import UserError, nearest
from jaxrl_llm.rewards.constraint_rules import KINDS, RULES, Undecidable
from jaxrl_llm.rewards.verdict import RewardInput, Status, Verdict


def names() -> tuple[str, ...]:
    """The names of all rules."""
    return tuple(sorted(RULES))


def validate(name: str, kwargs: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Checks a rule's name and parameters; returns the parameters as the rule takes them.

    A parameter given as None counts as not given: tables hold a column for every rule's parameters.
    where: put in front of the message, such as a row's id.
    Raises UserError naming the nearest rule or parameter.
    """
    prefix = f"{where}: " if where else ""
    found = RULES.get(name)
    if found is None:
        raise UserError(f"{prefix}unknown constraint {name!r}; {nearest(name, RULES)}")
    given = {key: value for key, value in kwargs.items() if value is not None}
    for key in given:
        if key not in found.parameters:
            raise UserError(f"{prefix}constraint {name} has no parameter {key!r}; {nearest(key, found.parameters)}")
    accepted = {}
    for key, kind in found.parameters.items():
        if key not in given:
            raise UserError(f"{prefix}constraint {name} needs the parameter {key!r} ({KINDS[kind]})")
        accepted[key] = kind(given[key])
        if accepted[key] is None:
            raise UserError(f"{prefix}parameter {key!r} of constraint {name} is {given[key]!r}; it must be {KINDS[kind]}")
    return accepted


def check(name: str, response: str, /, **kwargs: Any) -> Verdict:
    """Checks one rule on one response, strictly (the raw text, as IFEval's strict accuracy).

    Returns PASS or FAIL; ERROR where the rule needs a package that is not installed (language:response_language needs langdetect).
    Raises UserError for an unknown rule, and for a missing, unknown or ill-typed parameter.
    """
    accepted = validate(name, kwargs)
    try:
        satisfied, reason = RULES[name].check(response, **accepted)
    except Undecidable as error:
        return Verdict(Status.ERROR, reason=f"{name}: {error}")
    return Verdict(Status.PASS if satisfied else Status.FAIL, reason=f"{name}: {reason}")


def read_constraints(row: Mapping[str, Any], field: str = "constraints") -> list[tuple[str, dict[str, Any]]]:
    """The rules that a data row carries, as (name, kwargs) pairs.

    The field holds a list of {"name": ..., "kwargs": {...}}, or the same as JSON text (as tables keep it); IFEval's own two columns,
    `instruction_id_list` and `kwargs`, are read where the field is absent. A row without rules gives an empty list.
    Raises UserError naming the row for anything else, and for unknown rules or parameters.
    """
    where = f"row {row.get('id', '?')}"
    entries = _decode_list(row.get(field), where, field)
    if entries is None and row.get("instruction_id_list") is not None:
        rule_names = list(row["instruction_id_list"])
        parameters = _decode_list(row.get("kwargs"), where, "kwargs") or [{}] * len(rule_names)
        if len(parameters) != len(rule_names):
            raise UserError(f"{where}: {len(rule_names)} entries in 'instruction_id_list' but {len(parameters)} in 'kwargs'")
        entries = [{"name": name, "kwargs": kwargs} for name, kwargs in zip(rule_names, parameters, strict=True)]
    pairs = []
    for entry in entries or []:
        if not isinstance(entry, Mapping) or "name" not in entry:
            raise UserError(f'{where}: field {field!r} must hold a list of {{"name": ..., "kwargs": {{...}}}}, got {entry!r}')
        kwargs = _decode(entry.get("kwargs"), where, field) or {}
        pairs.append((entry["name"], validate(entry["name"], kwargs, where)))
    return pairs


def _decode_list(value: Any, where: str, field: str) -> list | None:
    value = _decode(value, where, field)
    if value is None:
        return None
    if isinstance(value, Mapping) or not hasattr(value, "__iter__"):
        raise UserError(f"{where}: field {field!r} must hold a list, got {value!r}")
    return list(value)


def _decode(value: Any, where: str, field: str) -> Any:
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
        """One verdict an input; a row without rules is NOT_APPLICABLE, a rule that cannot be checked makes the verdict an ERROR."""
        return [self._judge(item) for item in inputs]

    def validate_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raises UserError for the first row whose rules are unknown or ill-formed: to be called before a run starts."""
        for row in rows:
            read_constraints(row, self.field)

    def _judge(self, item: RewardInput) -> Verdict:
        text = item.prompt + item.response if self.include_prompt else item.response
        verdicts = [check(name, text, **kwargs) for name, kwargs in read_constraints(item.row, self.field)]
        if not verdicts:
            return Verdict(Status.NOT_APPLICABLE, reason="the row has no constraints")
        undecided = [verdict for verdict in verdicts if verdict.value is None]
        if undecided:
            return Verdict(Status.ERROR, reason=undecided[0].reason)
        failed = [verdict for verdict in verdicts if verdict.status is Status.FAIL]
        score = 1 - len(failed) / len(verdicts) if self.reduce == "mean" else None
        if failed:
            return Verdict(Status.FAIL, score, "; ".join(verdict.reason for verdict in failed))
        return Verdict(Status.PASS, score, f"all {len(verdicts)} constraints hold")
