"""The page of `jaxrl-llm eval` for IFEval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxrl_llm.report.svg import interval, number

LEVELS = {"prompt": "prompts followed as a whole", "instruction": "instructions followed"}
WAYS = {"strict": "the response as it stands", "loose": "without its first line, its last, or its stars"}


def ifeval_page(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The page data of a run's record (eval.json)."""
    page: dict[str, Any] = {
        "kind": "eval",
        "title": "IFEval",
        "subtitle": f"jaxrl-llm eval: {record['answered_by']}",
        "headline": _headline(record),
        "facts": _facts(record),
        "tables": [_accuracy(record), *_types(record)],
        "rollouts": [_rollout(shown) for shown in record["shown"]],
        "config": dict(config),
        "provenance": {
            "versions": record["versions"], "seconds": record["seconds"],
            "other": {
                "prompts": record["prompts"], "instructions": record["instructions"], "data": record["data"],
                **{f"no response: {reason}": count for reason, count in record["unanswered"].items()},
                **({"instructions without a verdict": record["undecided"]} if record["undecided"] else {}),
            },
        },
    }  # fmt: skip
    return {key: value for key, value in page.items() if value != []}


def cell(figure: Mapping[str, Any]) -> dict[str, Any] | None:
    """A figure as a table's cell; None where there is none."""
    return None if figure["value"] is None else {key: figure[key] for key in ("value", "low", "high")}


def fact(label: str, figure: Mapping[str, Any]) -> dict[str, str]:
    """A figure as a large fact: percent, its interval, what it counts."""
    span = interval(figure["low"], figure["high"], percent=True)
    detail = f"{number(figure['passed'])} of {number(figure['counted'])}" + (f", 95% {span}" if span else "")
    return {"label": label, "value": number(figure["value"], percent=True), "detail": detail}


def _headline(record: Mapping[str, Any]) -> str:
    prompt, instruction = (record["figures"][name] for name in ("prompt_strict", "instruction_strict"))
    if prompt["value"] is None:
        return f"None of the {number(record['prompts'])} prompts has a response that could be judged."
    missing = record["prompts"] - record["answered"]
    told = (
        f"{number(prompt['value'], percent=True)} of the prompts are followed as a whole and {number(instruction['value'], percent=True)} of the "
        "instructions, by the strict reading."
    )
    return told + (f" {number(missing)} of {number(record['prompts'])} prompts have no response and count in nothing." if missing else "")


def _facts(record: Mapping[str, Any]) -> list[dict[str, str]]:
    return [fact(name.replace("_", ", "), figure) for name, figure in record["figures"].items() if figure["value"] is not None]


def _accuracy(record: Mapping[str, Any]) -> dict[str, Any]:
    kinds, figures = {"strict": "ours"}, record["figures"]
    rows = [
        {"name": f"{way}: {what}", "cells": [cell(figures[f"{level}_{way}"]) for level in LEVELS], "kind": kinds.get(way, "baseline")}
        for way, what in WAYS.items()
    ]
    note = "By prompt Wilson’s interval; by instruction a bootstrap over prompts, whose instructions stand or fall together."
    return {
        "title": "Accuracy", "metric": "share, with its 95% interval", "columns": list(LEVELS.values()), "rows": rows, "higher_is_better": None,
        "percent": True, "note": note,
    }  # fmt: skip


def _types(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table of the groups and one of the types, the least followed first."""
    tables = []
    for title, groups in (("By group", True), ("By type", False)):
        found = {name: ways for name, ways in record["types"].items() if name.endswith(":") == groups and ways["strict"]["value"] is not None}
        ordered = sorted(found.items(), key=lambda item: item[1]["strict"]["value"])
        rows = [
            {"name": f"{name.rstrip(':')} ({ways['strict']['counted']})", "cells": [cell(ways[way]) for way in WAYS]} for name, ways in ordered
        ]
        if rows:
            note = "In brackets: how many instructions. Wilson’s intervals."
            tables.append({"title": title, "metric": "share of instructions followed, least first", "columns": list(WAYS), "rows": rows,
                           "higher_is_better": None, "percent": True, "note": note})  # fmt: skip
    return tables


def _rollout(shown: Mapping[str, Any]) -> dict[str, Any]:
    status = {True: "PASS", False: "FAIL", None: "ERROR"}[shown["followed"]]
    response = {"text": shown["response"], "status": status, "reason": "; ".join(shown["reasons"]) or None}
    return {"prompt": shown["prompt"], "responses": [response], "tags": {"id": shown["id"], "asks for": ", ".join(shown["instructions"])}}
