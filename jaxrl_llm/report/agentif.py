"""The page of `jaxrl-llm eval` for AgentIF."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxrl_llm.report.ifeval import cell, fact
from jaxrl_llm.report.svg import number

WAYS_NOTE = (
    "Published: whatever has no score is dropped, as the public code does. Crashed: what was never scored counts as not satisfied. Strict: every "
    "error does."
)
OUTCOMES = ("passed", "failed", "closed", "broken", "unscored", "error", "timeout", "unreadable", "unanswered", "infrastructure")
RESULTS_NOTE = (
    "Closed: the condition is not met (in a stored file, any null behind a condition). Broken: no response can be judged by it. Unscored: the file "
    "holds no score. Infrastructure: the judge gave none; counted nowhere."
)


def agentif_page(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The page data of a run's record (eval.json)."""
    page: dict[str, Any] = {
        "kind": "eval",
        "title": "AgentIF",
        "subtitle": f"jaxrl-llm eval: {record['answered_by']}",
        "headline": _headline(record),
        "facts": _facts(record),
        "tables": [*_rates(record), *_contamination(record), _outcomes(record), *_lengths(record), *_places(record)],
        "plots": _length_plot(record),
        "rollouts": [_rollout(shown) for shown in record["shown"]],
        "config": dict(config),
        "provenance": {"versions": record["versions"], "seconds": record["seconds"], "other": _other(record)},
    }
    return {key: value for key, value in page.items() if value != []}


def _headline(record: Mapping[str, Any]) -> str:
    csr, isr = (record["ways"]["strict"][name] for name in ("CSR", "ISR"))
    if csr["value"] is None:
        return f"Of {number(record['constraints'])} constraints in {number(record['rows'])} rows none has a verdict."
    told = (
        f"{number(csr['value'], percent=True)} of the constraints are satisfied and {number(isr['value'], percent=True)} of the instructions as a "
        "whole, with every error counted as not satisfied."
    )
    waiting = record["infrastructure"]
    return told + (f" {number(waiting)} constraints still wait for a verdict and count in nothing." if waiting else "")


def _facts(record: Mapping[str, Any]) -> list[dict[str, str]]:
    pairs = [("published", "CSR"), ("published", "ISR"), ("strict", "CSR"), ("strict", "ISR")]
    return [fact(f"{name}, {way}", record["ways"][way][name]) for way, name in pairs if record["ways"][way][name]["value"] is not None]


def _rates(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The success rates over all, and those of groups of constraints; a row a way."""
    ways, kinds = record["ways"], {"strict": "ours"}

    def rows(of_way: Any) -> list[dict[str, Any]]:
        return [{"name": way, "cells": of_way(found), "kind": kinds.get(way, "baseline")} for way, found in ways.items()]

    def groups(title: str, metric: str, of_way: Any) -> dict[str, Any]:
        columns = list(dict.fromkeys(name for found in ways.values() for name in of_way(found)))
        cells = rows(lambda found: [cell(of_way(found)[name]) if name in of_way(found) else None for name in columns])
        return {"title": title, "metric": metric, "columns": columns, "rows": cells, "higher_is_better": None, "marks": False, "percent": True}

    note = f"CSR: constraints satisfied. ISR: instructions of which all are. {WAYS_NOTE}"
    return [
        {
            "title": "Success rates", "metric": "with 95% intervals of a bootstrap over instructions", "columns": ["CSR", "ISR"],
            "rows": rows(lambda found: [cell(found["CSR"]), cell(found["ISR"])]), "higher_is_better": None, "percent": True, "note": note,
        },
        groups("CSR by dimension", "when a constraint holds", lambda found: found["dimension"]),
        groups("CSR by type", "and of meta constraints, which speak of other constraints", lambda found: {**found["type"], "meta": found["meta"]}),
    ]  # fmt: skip


def _outcomes(record: Mapping[str, Any]) -> dict[str, Any]:
    columns = [name for name in OUTCOMES if name in record["outcomes"]["all"]]
    rows = [
        {"name": sequence, "cells": [{"value": counts[name]} if name in counts else None for name in columns]}
        for sequence, counts in record["outcomes"].items()
    ]
    shown = {"all": "all", "none": "no evaluation"}
    for row in rows:
        row["name"] = shown.get(row["name"], row["name"].replace("-", ", then ").replace("cond", "condition"))
    return {
        "title": "Outcomes", "metric": "constraints by how they are evaluated", "columns": columns, "rows": rows, "higher_is_better": None,
        "marks": False, "note": RESULTS_NOTE,
    }  # fmt: skip


def _span(group: Mapping[str, Any]) -> str:
    return f"{number(group['low'])} to {number(group['high'])} words" if group["high"] else f"from {number(group['low'])} words"


def _lengths(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {"name": f"{_span(group)} ({number(group['rows'])} rows)", "cells": [cell(group["CSR"]), cell(group["ISR"])]} for group in record["lengths"]
    ]
    table = {
        "title": "By length", "metric": "of the whole input, strict", "columns": ["CSR", "ISR"], "rows": rows, "higher_is_better": None,
        "percent": True,
    }  # fmt: skip
    return [table] if rows else []


def _places(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [{"name": f"{found['place']} ({number(found['counted'])})", "cells": [cell(found)]} for found in record["places"]]
    table = {
        "title": "By place of the rule", "metric": "where its last sentence stands, strict", "columns": ["CSR"], "rows": rows,
        "higher_is_better": None, "percent": True, "note": "Rules are dealt to places at random: some places have harder ones.",
    }  # fmt: skip
    return [table] if rows else []


def _length_plot(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    if len(record["lengths"]) < 2:
        return []
    series = [
        {"label": name, "points": [{"x": group["words"], **(cell(group[name]) or {"value": None})} for group in record["lengths"]], **kind}
        for name, kind in (("CSR", {"kind": "ours"}), ("ISR", {}))
    ]
    note = "A dot a group of lengths, at the median of its instructions."
    plot = {"title": "Success by length", "x_label": "words of the input", "x_log": True, "percent": True, "series": series, "note": note}
    return [plot]


def _contamination(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = [
        {"name": f"seed {one['seed']} less seed {one['other']} ({one['rows']} rows)", "cells": [{key: one[key] for key in ("value", "low", "high")}]}
        for one in record["contamination"]
    ]
    note = "The same rules and lengths with other content. Above zero: the model knows the first seed’s content."
    table = {"title": "Content seen before", "metric": "difference of the rows’ mean success, paired", "columns": ["difference"], "rows": rows,
             "higher_is_better": None, "note": note}  # fmt: skip
    return [table] if rows else []


def _other(record: Mapping[str, Any]) -> dict[str, Any]:
    replay = record["replay"]
    told = {
        "source": record["source"], "judged by": record["judged_by"], "rows": record["rows"], "different instructions": record["instructions"],
        "constraints": record["constraints"], "names of agents": record["agents"], "words, mean": round(record["words"]["mean"]),
        "words, most": record["words"]["most"],
    }  # fmt: skip
    if record["absent"]:
        told["rows that the source lacks"] = record["absent"]
    if record["skipped"]:
        told["rows that could not be read"] = len(record["skipped"])
    if replay and replay.get("refused"):
        told["code run again"] = f"none: {replay['refused']}"
    elif replay:
        told["code run again"] = f"{replay['run']} checks: {replay['agree']} agree, {len(replay['differ'])} differ, {replay['undecided']} no verdict"
    if record["executing"]:
        told["checks that execute text"] = record["executing"]
    return told | {f"dirty spot: {name}": count for name, count in record["notes"].items() if count}


def _rollout(shown: Mapping[str, Any]) -> dict[str, Any]:
    whole = shown["satisfied"] == shown["counted"]
    status = "UNJUDGED" if not shown["counted"] else "PASS" if whole else "FAIL"
    reason = None if whole else "not satisfied: " + "; ".join(shown["failing"])
    tags = {"row": shown["name"], "agent": shown["agent"], "words": shown["words"], "satisfied": f"{shown['satisfied']} of {shown['counted']}"}
    return {"prompt": shown["prompt"], "responses": [{"text": shown["response"], "status": status, "reason": reason}], "tags": tags}
