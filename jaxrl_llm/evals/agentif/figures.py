"""AgentIF's figures: constraint success rate (CSR), instruction success rate (ISR), by dimension, by type, meta, and by length.

CSR is micro over constraints; ISR is over the rows with a constraint that counts. Intervals are of a bootstrap over instructions, whose
constraints stay together; rows with the same input, of which the published file has some, are drawn together. A share of 0 or 1 has Wilson's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_llm.evals.agentif.outcomes import WAYS, Outcome, Result
from jaxrl_llm.evals.agentif.rows import DIMENSIONS, TYPES, Constraint, Row
from jaxrl_llm.evals.statistics import bootstrap_sums, paired_bootstrap, share_limits

# As the published tables name them.
NAMES = {
    "unconditional": "vanilla", "conditional": "condition", "example_driven": "example", "formatting": "formatting", "semantic": "semantic",
    "resource": "tool",
}  # fmt: skip
LENGTHS = (0, 250, 500, 1000, 2000, 4000, 8000, 12000)  # words from which a group of instructions goes; the last has no end
Judged = tuple[Row, Sequence[Outcome]]


def table(judged: Sequence[Judged], *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
    """{way: {"CSR", "ISR", "dimension": {name: ...}, "type": {...}, "meta"}} of WAYS, each figure {value, low, high, passed, counted}.

    A figure of nothing has the value None. In the published way meta constraints are those whose key is spelt right, and a constraint without a
    type is in no type; so it is in the other ways, but for the spelling.
    """
    clusters = {key: place for place, key in enumerate(dict.fromkeys(row.key for row, _ in judged))}
    sums: dict[str, np.ndarray] = {}

    def add(name: str, row: Row, passed: float, counted: float) -> None:
        for part, value in (("passed", passed), ("counted", counted)):
            sums.setdefault(f"{name} {part}", np.zeros(len(clusters)))[clusters[row.key]] += value

    for row, outcomes in judged:
        for way in WAYS:
            add(f"{way} CSR", row, 0, 0)
            counted = [(constraint, found) for constraint, outcome in zip(row.constraints, outcomes, strict=True)
                       if (found := outcome.counts(way)) is not None]  # fmt: skip
            if counted:
                add(f"{way} ISR", row, not any(outcome.blocks(way) for outcome in outcomes), 1)
            for constraint, satisfied in counted:
                for group in ("CSR", *groups_of(constraint, way)):
                    add(f"{way} {group}", row, satisfied, 1)
    names = list(dict.fromkeys(name.rpartition(" ")[0] for name in sums))

    def shares(total: dict[str, Any]) -> dict[str, Any]:
        return {name: _share(total[f"{name} passed"], total[f"{name} counted"]) for name in names}

    limits = bootstrap_sums(sums, shares, draws=draws, seed=seed)
    return {way: _of_way(way, sums, limits) for way in WAYS}


def groups_of(constraint: Constraint, way: str) -> list[str]:
    """The groups that a constraint counts in: its dimension, each of its types, meta."""
    meta = constraint.meta_published if way == "published" else constraint.meta
    return [f"dimension:{constraint.dimension}", *(f"type:{kind}" for kind in constraint.types), *(["meta"] if meta else [])]


def _share(passed: Any, counted: Any) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(passed, counted) if np.ndim(counted) or counted else float("nan")


def _of_way(way: str, sums: Mapping[str, np.ndarray], limits: Mapping[str, Any]) -> dict[str, Any]:
    def figure(group: str) -> dict[str, Any]:
        name = f"{way} {group}"
        if name not in limits or not sums[f"{name} counted"].any():
            return {"value": None, "low": None, "high": None, "passed": 0, "counted": 0}
        found = share_limits(limits[name], int(np.count_nonzero(sums[f"{name} counted"])))
        totals = {part: int(sums[f"{name} {part}"].sum()) for part in ("passed", "counted")}
        return {"value": found.estimate, "low": found.low, "high": found.high, **totals}

    def others(kind: str, known: Sequence[str]) -> list[str]:
        seen = [name.removeprefix(f"{way} {kind}:").rpartition(" ")[0] for name in sums if name.startswith(f"{way} {kind}:")]
        return [name for name in dict.fromkeys(seen) if name not in known]

    return {
        "CSR": figure("CSR"),
        "ISR": figure("ISR"),
        "dimension": {NAMES.get(name, name): figure(f"dimension:{name}") for name in (*DIMENSIONS, *others("dimension", DIMENSIONS))},
        "type": {NAMES.get(name, name): figure(f"type:{name}") for name in (*TYPES, *others("type", TYPES))},
        "meta": figure("meta"),
    }


def tally(judged: Sequence[Judged]) -> dict[str, dict[str, int]]:
    """{sequence: {result: how many}}, "all" first."""
    counts: dict[str, Counter[str]] = {"all": Counter()}
    for row, outcomes in judged:
        for constraint, outcome in zip(row.constraints, outcomes, strict=True):
            for name in ("all", constraint.sequence):
                counts.setdefault(name, Counter())[str(outcome.result)] += 1
    return {name: {str(result): found[str(result)] for result in Result if found[str(result)]} for name, found in counts.items()}


def by_length(judged: Sequence[Judged], *, draws: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """{"low", "high", "words", "rows", "CSR", "ISR"} of each group of LENGTHS that has rows, in the strict way; words: their median."""
    found = []
    for low, high in zip(LENGTHS, (*LENGTHS[1:], None), strict=True):
        inside = [one for one in judged if one[0].words >= low and (high is None or one[0].words < high)]
        if inside:
            figures = table(inside, draws=draws, seed=seed)["strict"]
            words = float(np.median([row.words for row, _ in inside]))
            found.append({"low": low, "high": high, "words": words, "rows": len(inside), "CSR": figures["CSR"], "ISR": figures["ISR"]})
    return found


PLACES = ("list of rules", "manual, first third", "manual, middle", "manual, last third", "earlier turn")


def by_place(judged: Sequence[Judged], *, draws: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """{"place", "value", "low", "high", "passed", "counted"} of made rows' constraints by where the last sentence of their rule stands, in the strict
    way; none for other rows."""
    sums: dict[str, np.ndarray] = {}
    for i, (row, outcomes) in enumerate(judged):
        for raw, outcome in zip(row.raw["constraints"] if "made" in row.raw else (), outcomes):
            satisfied = outcome.counts("strict")
            if satisfied is not None:
                place = place_of(raw["other_info"])
                for part, value in (("passed", satisfied), ("counted", 1)):
                    sums.setdefault(f"{place} {part}", np.zeros(len(judged)))[i] += value
    found = []
    for place in PLACES:
        if f"{place} counted" in sums:
            passed, counted = (sums[f"{place} {part}"] for part in ("passed", "counted"))
            both = {"p": passed, "c": counted}
            limits = bootstrap_sums(both, lambda total: {"share": _share(total["p"], total["c"])}, draws=draws, seed=seed)
            span = share_limits(limits["share"], int(np.count_nonzero(counted)))
            totals = {"passed": int(passed.sum()), "counted": int(counted.sum())}
            found.append({"place": place, "value": span.estimate, "low": span.low, "high": span.high, **totals})
    return found


def place_of(info: Mapping[str, Any]) -> str:
    """A place of PLACES, of a made constraint's other_info."""
    last = info["from"][-1]
    return PLACES[1 + min(int(3 * info["depth"][-1]), 2)] if last == "manual" else PLACES[0] if last == "list" else PLACES[-1]


def success(row: Row, outcomes: Sequence[Outcome]) -> float | None:
    """The share of a row's constraints that are satisfied, in the strict way; None where none counts."""
    counted = [found for outcome in outcomes if (found := outcome.counts("strict")) is not None]
    return sum(counted) / len(counted) if counted else None


def fresh_difference(judged: Sequence[Judged], *, draws: int = 4000, seed: int = 0) -> list[dict[str, Any]]:
    """Of rows made with several seeds (fresh.py), which differ in their content alone: the rows' mean success under the first seed, less that
    under each other one, paired by the plan they share. Where the first has been published and the others are new, what is above zero is
    memory of the published content."""
    by_seed: dict[int, dict[int, float]] = {}
    for row, outcomes in judged:
        made, value = row.raw.get("made"), success(row, outcomes)
        if isinstance(made, Mapping) and value is not None:
            by_seed.setdefault(int(made["seed"]), {})[int(made["plan"])] = value
    first, *others = by_seed or {0: {}}
    found = []
    for other in others:
        plans = sorted(by_seed[first].keys() & by_seed[other].keys())
        if plans:
            a, b = ([by_seed[which][plan] for plan in plans] for which in (first, other))
            span = paired_bootstrap(np.array(a), np.array(b), draws=draws, seed=seed)
            found.append({"seed": first, "other": other, "rows": len(plans), "value": span.estimate, "low": span.low, "high": span.high})
    return found
