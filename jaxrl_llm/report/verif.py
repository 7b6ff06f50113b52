"""The page of a VerIF run: arms before and after on held-out instructions, the judge against the truth, language kept, responses side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.evals.following import FIGURES, agreement, figure_of, gain_of
from jaxrl_llm.evals.statistics import Interval, bootstrap_sums
from jaxrl_llm.run_dir import read_jsonl

SMOOTH = 9  # steps of the running mean of a reward curve
NOTE = (
    "“As given” is the policy before it was taught the format, “before” the one that every arm starts from. Strict is the response as it stands, "
    "loose any of IFEval's variants of it. Limits: Wilson's over prompts for one seed, else a bootstrap over prompts, as for rules always."
)
BY_CODE, WITH_SOFT = ("instructions", "instructions_loose", "prompts", "prompts_loose"), ("soft", "everything", "judged")  # FIGURES in two tables
GAINS = ("instructions", "prompts", "soft", "everything")  # of FIGURES
KINDS = {"sets": "greedy", "sampled": "sampled at temperature 1"}


def build(
    config: Any, root: Path, sets: Mapping[str, Sequence[Mapping[str, Any]]], results: Mapping[str, Mapping[str, Any]], seconds: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(summary, page data) of a run.

    results: of "base", "before" and "ARM-seedN": {"sets" and "sampled": {set: what `follow` gives, with "responses"}, "nats", "tokens"}.
    """
    runs = {arm: [results[f"{arm}-seed{seed}"] for seed in config.seeds] for arm in config.arms}
    policies = {"as given": [results["base"]], "before": [results["before"]], **runs}
    figures: dict[str, Any] = {}
    for kind in KINDS:
        figures[kind] = {
            name: {
                policy: {key: _plain(figure_of([run[kind][name] for run in of], key)) for key in FIGURES} for policy, of in policies.items()
            }
            for name in sets
        }
    gains = {
        kind: {
            name: {arm: {key: _plain(gain_of([run[kind][name] for run in of], results["before"][kind][name], key)) for key in FIGURES}
                   for arm, of in runs.items()}
            for name in sets
        }
        for kind in KINDS
    }  # fmt: skip
    judge = _judge(root, sets, policies)
    language = {policy: _plain(_nll(of)) for policy, of in policies.items() if of[0]["tokens"]}
    summary = {"figures": figures, "gains": gains, "judge": judge, "nats_a_token": language, "seconds": seconds}
    return summary, _page(config, root, sets, results, summary)


def _plain(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    told = {"value": interval.estimate, "low": interval.low, "high": interval.high}
    return {key: round(value, 9) + 0.0 for key, value in told.items()}  # no -0.0, which Wilson's lower limit may come to


def _nll(runs: Sequence[Mapping[str, Any]]) -> Interval:
    """Nats a token of held-out stories, with limits by a bootstrap over stories."""
    sums = {"nats": np.sum([run["nats"] for run in runs], axis=0), "tokens": np.sum([run["tokens"] for run in runs], axis=0)}
    return bootstrap_sums(sums, lambda total: {"nll": total["nats"] / total["tokens"]})["nll"]


def _judge(root: Path, sets: Mapping[str, Any], policies: Mapping[str, Any]) -> dict[str, Any]:
    """The judge against the truth, on stories and on each policy's sampled responses; empty where no truth is known."""
    path = root / "judge.json"
    told = {"held-out stories": agreement(json.loads(path.read_text()))} if path.exists() else {}
    for policy, runs in policies.items():
        every = [run["sampled"][name] for run in runs for name in sets]
        found = agreement({key: [value for one in every for value in one[key]] for key in ("strict", "loose", "soft", "judged")})
        if found["n"]:
            told[policy] = found
    return {name: {key: _plain(value) if isinstance(value, Interval) else value for key, value in found.items()} for name, found in told.items()}


def _page(config: Any, root: Path, sets: Mapping[str, Any], results: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    first = next(iter(sets))
    shown = [(i, name) for i in range(config.shown) for name in sets if i < len(sets[name])]
    main = config.arms[0]
    tables = [table for name in sets for kind in KINDS for table in _figures_tables(summary, kind, name, config)]
    tables[0]["note"] = NOTE
    tables += [_gains_table(summary, kind, name, config) for name in sets for kind in KINDS]
    if summary["judge"]:
        tables.append(_judge_table(summary["judge"]))
    if summary["nats_a_token"]:
        tables.append(_language_table(summary["nats_a_token"], config))
    return {
        "kind": "run",
        "title": config.title,
        "subtitle": "Instruction following, rewarded by rules and a judge",
        "headline": _headline(summary, first, main),
        "facts": _facts(summary, sets, main),
        "panels": [_rewards(config, root), *_metrics(config, root)],
        "tables": tables,
        "rollouts": [_side_by_side(config, sets[name], results, name, i) for i, name in shown[: config.shown]],
        "config": config.to_dict(),
        "provenance": {"seeds": list(config.seeds), "seconds": summary["seconds"]},
    }


def _share(estimate: Mapping[str, float] | None) -> str:
    return "no verdict" if estimate is None else f"{100 * estimate['value']:.1f}%"


def _headline(summary: Mapping[str, Any], name: str, main: str) -> str:
    before, after = (summary["figures"]["sampled"][name][policy] for policy in ("before", main))
    gain = summary["gains"]["sampled"][name][main]["instructions"]
    clear = gain is not None and (gain["low"] > 0 or gain["high"] < 0)
    nats = summary["nats_a_token"]
    language = f" Held-out stories cost {nats[main]['value']:.3f} nats a token, {nats['before']['value']:.3f} before." if main in nats else ""
    right = [summary["judge"].get(policy, {}).get("accuracy") for policy in ("before", main)]
    judge = f" Of what it samples the judge is right about {_share(right[1])}, of the policy before about {_share(right[0])}." if all(right) else ""
    return (
        f"On held-out prompts ({name}) the rules that sampled responses of arm {main} keep went from {_share(before['instructions'])} to "
        f"{_share(after['instructions'])}{'' if clear else ', within its noise'}; soft constraints from {_share(before['soft'])} to "
        f"{_share(after['soft'])}.{judge}{language}"
    )


def _facts(summary: Mapping[str, Any], sets: Mapping[str, Any], main: str) -> list[dict[str, str]]:
    facts = []
    for name in sets:
        gain = summary["gains"]["sampled"][name][main]["instructions"]
        if gain is not None:
            value, low, high = (f"{100 * gain[key]:+.1f}" for key in ("value", "low", "high"))
            facts.append({"label": f"rules kept, {name}", "value": f"{value} points", "detail": f"95% {low} to {high}, sampled"})
    right = summary["judge"].get("held-out stories", {}).get("accuracy")
    if right is not None:
        limits = f"95% {100 * right['low']:.1f} to {100 * right['high']:.1f}"
        facts.append({"label": "the judge is right", "value": _share(right), "detail": f"{limits}, of held-out stories"})
    return facts


def _rows(config: Any, figures: Mapping[str, Any], columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """A row for each policy, the main arm marked."""
    kinds = {"as given": "bound", "before": "baseline", config.arms[0]: "ours"}
    rows = []
    for policy, found in figures.items():
        row: dict[str, Any] = {"name": policy, "cells": [found] if columns is None else [found[key] for key in columns]}
        rows.append(row | ({"kind": kinds[policy]} if policy in kinds else {}))
    return rows


def _figures_tables(summary: Mapping[str, Any], kind: str, name: str, config: Any) -> list[dict[str, Any]]:
    """One of the rules, and one of the soft constraints where there are any: all in one is wider than a page."""
    found, tables = summary["figures"][kind][name], []
    for keys, metric in ((BY_CODE, "share of rules, or of prompts, 95% limits"), (WITH_SOFT, "share of prompts, 95% limits")):
        columns = [key for key in keys if any(of[key] is not None for of in found.values())]
        if columns:
            tables.append({
                "title": f"{'Rules' if keys is BY_CODE else 'Soft constraints'}, held-out prompts, {name}: {KINDS[kind]}",
                "metric": metric,
                "columns": [FIGURES[key] for key in columns],
                "rows": _rows(config, found, columns),
                "marks": False,
                "percent": True,
            })  # fmt: skip
    return tables


def _gains_table(summary: Mapping[str, Any], kind: str, name: str, config: Any) -> dict[str, Any]:
    found = {arm: summary["gains"][kind][name][arm] for arm in config.arms}
    columns = [key for key in GAINS if any(of[key] is not None for of in found.values())]
    rows: list[dict[str, Any]] = [{"name": arm, "cells": [of[key] for key in columns]} for arm, of in found.items()]
    rows[0]["kind"] = "ours"
    return {
        "title": f"Change from before, held-out prompts, {name}: {KINDS[kind]}",
        "metric": "in percentage points, paired by prompt, 95% limits",
        "columns": [FIGURES[key] for key in columns],
        "rows": rows,
        "marks": False,
        "percent": True,
    }


def _judge_table(judge: Mapping[str, Any]) -> dict[str, Any]:
    keys = {"accuracy": "right", "sensitivity": "right where the constraint is kept", "specificity": "right where it is broken"}
    return {
        "title": "The judge against the truth",
        "metric": "share of verdicts on soft constraints, 95% limits",
        "columns": list(keys.values()),
        "rows": [{"name": name, "cells": [found[key] for key in keys]} for name, found in judge.items()],
        "marks": False,
        "percent": True,
        "higher_is_better": None,
        "note": "On stories that nothing was trained on, and on what each policy samples: an arm that finds what the judge gets wrong shows here.",
    }


def _language_table(language: Mapping[str, Any], config: Any) -> dict[str, Any]:
    return {
        "title": "Language still modelled?",
        "metric": "loss on held-out stories",
        "columns": ["nats a token"],
        "rows": _rows(config, language),
        "higher_is_better": False,
        "marks": False,
        "note": "Whole stories, without an instruction before them. Limits: bootstrap over stories.",
    }


def _training(config: Any, root: Path, key: str) -> list[dict[str, Any]]:
    """A metric of each arm's training, a running mean over steps of the mean over seeds."""
    series = []
    for arm in config.arms:
        lines = [read_jsonl(root / "arms" / f"{arm}-seed{seed}" / "metrics.jsonl") for seed in config.seeds]
        values = np.array([[r.get(key) for r in line if r["kind"] == "train"] for line in lines], float)
        window = [values[:, max(0, i - SMOOTH + 1) : i + 1] for i in range(values.shape[1])]
        smooth = [float(np.nanmean(w)) if np.isfinite(w).any() else None for w in window]
        series.append({"label": arm, "steps": list(range(1, len(smooth) + 1)), "values": smooth})
    return series


def _rewards(config: Any, root: Path) -> dict[str, Any]:
    note = f"Each arm's own reward, not the same quantity in all. All panels: running mean over {SMOOTH} steps."
    return {"title": "Reward in training", "series": _training(config, root, "reward"), "note": note}


def _metrics(config: Any, root: Path) -> list[dict[str, Any]]:
    shown = {"zero_spread": "Groups of equal rewards", "kl": "KL to the policy before", "entropy": "Entropy", "completion_length": "Length (tokens)"}
    return [{"title": title, "series": _training(config, root, key)} for key, title in shown.items()]


def _side_by_side(config: Any, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Any], name: str, index: int) -> dict[str, Any]:
    responses = []
    for arm in ("before", *config.arms):
        found = results["before" if arm == "before" else f"{arm}-seed{config.seeds[0]}"]["sampled"][name]
        rules, soft, judged = found["strict"][index], found["soft"][index], found["judged"][index]
        told = [f"{sum(rule == 1 for rule in rules)} of {len(rules)} rules"]
        told += [f"soft constraint {'kept' if soft else 'broken'}"] if soft is not None else []
        told += [f"the judge says {'yes' if judged else 'no'}"] if judged is not None else []
        known = [value for value in (*rules, soft) if value is not None]
        status = "UNJUDGED" if not known else "PASS" if all(known) else "FAIL"
        responses.append({"text": found["responses"][index], "status": status, "reason": "; ".join(told), "arm": arm})
    return {"prompt": rows[index]["prompt"], "responses": responses, "tags": {"rules": name}}


def markdown(page: Mapping[str, Any]) -> str:
    """The tables of a page as Markdown."""

    def cell(estimate: Mapping[str, float] | None, percent: bool) -> str:
        if estimate is None:
            return ""
        shown = [estimate["value"], estimate["low"], estimate["high"]]
        value, low, high = (f"{100 * x:.1f}" if percent else f"{x:.3f}" for x in shown)
        return f"{value} ({low} to {high})"

    blocks = []
    for table in page["tables"]:
        percent = table.get("percent", False)
        lines = [f"## {table['title']}", "", "| | " + " | ".join(table["columns"]) + " |", "|" + " --- |" * (len(table["columns"]) + 1)]
        lines += [f"| {row['name']} | " + " | ".join(cell(c, percent) for c in row["cells"]) + " |" for row in table["rows"]]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
