"""What a row asks of a response, in VerInstruct's form and ours; and rows of that form made from any text by back-translation.

VerInstruct (Peng et al. 2025, arXiv:2506.09942): `checkers`, names of which each holds "[rule]" or "[llm]", and `functions`, for each checker the
Python source of a `check_following(instruction, response)`. A rule is decided by its function, a soft constraint by a judge, all of a row in one
question. The columns may also lie inside `reward_model.ground_truth` as JSON, as in the rows that the authors train on. Ours: `constraints`, by
name, as `constraints.read_constraints` takes them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.constraints import back_translate, read_constraints
from jaxrl_llm.rewards.constraints.reward import decode_json, decode_list
from jaxrl_llm.rewards.constraints.table import say

RULE, SOFT = "[rule]", "[llm]"
ENTRY = "check_following"  # what a function's source defines
HELPERS = re.compile(r"\b(?:import|from)\s+llm_call\b")  # the module by which a function of the data set asks a language model


@dataclass(frozen=True)
class Requirements:
    """constraints: (name, parameters) of the registry. functions: (checker, Python source) of the rules that come as code. soft: constraints that
    a judge decides. untagged: checkers that say neither "[rule]" nor "[llm]"."""

    constraints: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    functions: list[tuple[str, str]] = field(default_factory=list)
    soft: list[str] = field(default_factory=list)
    untagged: list[str] = field(default_factory=list)

    def rules(self) -> list[str]:
        """The rules in words, those by code by their names."""
        return [say(name, kwargs) for name, kwargs in self.constraints] + [name for name, _ in self.functions]


def read_requirements(row: Mapping[str, Any], field: str = "constraints") -> Requirements:
    """The requirements of a row; a row that asks for nothing has none.

    field: the column of constraints by name.
    Raises UserError naming the row: as many functions as checkers are needed, texts all of them, and no checker may bear both tags.
    """
    where = f"row {row.get('id', '?')}"
    told = row
    if row.get("checkers") is None and isinstance(inner := decode_json(row.get("reward_model"), where, "reward_model"), Mapping):
        told = decode_json(inner.get("ground_truth"), where, "reward_model.ground_truth")
        if not isinstance(told, Mapping):
            raise UserError(f"{where}: reward_model.ground_truth must hold an object with 'checkers' and 'functions', got {told!r:.80}")
    checkers = decode_list(told.get("checkers"), where, "checkers") or []
    functions = decode_list(told.get("functions"), where, "functions") or [""] * len(checkers)
    if len(checkers) != len(functions):
        raise UserError(f"{where}: {len(checkers)} entries in 'checkers' but {len(functions)} in 'functions': each checker has its function")
    found = Requirements(read_constraints(row, field))
    for checker, source in zip(checkers, functions, strict=True):
        if not isinstance(checker, str) or not checker.strip():
            raise UserError(f"{where}: a checker is {checker!r:.80}, not a text such as '[rule] No_Commas'")
        rule, soft = RULE in checker, SOFT in checker
        name = " ".join(checker.replace(RULE, "").replace(SOFT, "").split())
        if rule and soft:
            raise UserError(f"{where}: the checker {checker!r:.80} is tagged both {RULE} and {SOFT}: leave one")
        if soft:
            found.soft.append(name)
        elif not rule:
            found.untagged.append(name)
        elif not isinstance(source, str) or not source.strip():
            raise UserError(f"{where}: the checker {checker!r:.80} has no function: give the source of {ENTRY}(instruction, response)")
        else:
            found.functions.append((name, source))
    return found


def look_over(rows: Iterable[Mapping[str, Any]], field: str = "constraints") -> tuple[Counter[str], str]:
    """(how many "rows", "rules", "soft", "untagged" checkers there are, and "asking" functions that import VerInstruct's helpers; the first untagged
    one by row and name). Raises UserError as `read_requirements`."""
    counts: Counter[str] = Counter(rows=0, rules=0, soft=0, untagged=0, asking=0)
    first = ""
    for row in rows:
        found = read_requirements(row, field)
        counts["rows"] += 1
        counts["rules"] += len(found.constraints) + len(found.functions)
        counts["soft"] += len(found.soft)
        counts["untagged"] += len(found.untagged)
        counts["asking"] += sum(bool(HELPERS.search(source)) for _, source in found.functions)
        if found.untagged and not first:
            first = f"{found.untagged[0]!r} of row {row.get('id', '?')}"
    return counts, first


def make_rows(
    responses: Sequence[str],
    types: Sequence[str],
    number: tuple[int, int],
    soft_of: Callable[[str], Sequence[str]],
    template: str,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows {"id", "prompt", "answer", "constraints", "checkers", "functions"} whose answer is a given response: the construction of VerInstruct.

    types: names of constraints to draw from. number: from so many to so many of them a row, equally likely; a response with fewer than the least
    is left out. soft_of: soft constraints that a response keeps, of which the first is asked for. template: a format with {constraints}, the
    sentences in a random order. The same for the same arguments.
    """
    low, high = number
    rows = []
    for index, response in enumerate(responses):
        rng = random.Random(f"{seed} {index} {response}".encode("utf-8", "surrogatepass"))
        rules = back_translate(response, rng.randint(low, high), seed=seed, only=types)
        if len(rules) < low:
            continue
        soft = list(soft_of(response))[:1]
        sentences = [rule["text"] for rule in rules] + soft
        rng.shuffle(sentences)
        rows.append({
            "id": f"made-{seed}-{index:06d}",
            "prompt": template.replace("{constraints}", " ".join(sentences)),
            "answer": response,
            "constraints": [{"name": rule["name"], "kwargs": rule["kwargs"]} for rule in rules],
            "checkers": [f"{SOFT} {sentence}" for sentence in soft],
            "functions": [""] * len(soft),
        })  # fmt: skip
    return rows
