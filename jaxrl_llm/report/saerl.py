"""The page of a SAERL experiment: what its cells left on disk, put together and compared."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm import __version__
from jaxrl_llm.config import to_dict
from jaxrl_llm.curation.curated_set import CuratedSet
from jaxrl_llm.curation.probes import auroc, spearman
from jaxrl_llm.evals.statistics import Interval, paired_bootstrap, paired_t, steps_saved, steps_to_target
from jaxrl_llm.report import summarise

# Of a run without arms on other features; what docs/saerl.md found.
UNCONTROLLED = (
    "No arm here goes by other features, so this run does not tell what brings a difference: in the lab (docs/saerl.md) arms on random "
    "clusters, an untrained SAE or no features beside the policy's view of the answers do as well."
)


class ArmRuns:
    """One arm over the cells of a pool: evaluation curves, final rates of each item, and what the training saw."""

    def __init__(self, folders: Sequence[Path], arm: str):
        self.arm = arm
        self.records = [[json.loads(line) for line in (f / arm / "metrics.jsonl").open()] for f in folders]
        evals = [[r for r in cell if r["kind"] == "eval"] for cell in self.records]
        self.steps = sorted({r["step"] for r in evals[0]})
        sets = sorted({r["set"] for r in evals[0]})

        def at(cell, step):
            return [next(r for r in cell if r["step"] == step and r["set"] == name) for name in sets]

        # Every held-out set weighs the same, whatever its size.
        self.curve = np.array([[np.mean([r["avg_at_k"] for r in at(c, s)]) for s in self.steps] for c in evals])  # [cells, evals]
        self.items = np.array([np.concatenate([np.asarray(r["rates"], float) for r in at(c, self.steps[-1])]) for c in evals])
        levels = [at(c, self.steps[-1])[0]["by_avg_at_k"].get("level", {}) for c in evals]
        self.levels = {level: np.array([cell[level] for cell in levels]) for level in levels[0]}
        train = [[r for r in cell if r["kind"] == "train"] for cell in self.records]
        self.mixed = np.array([[1 - r["zero_spread"] for r in c] for c in train])  # [cells, steps]
        self.rows = [[r["rows"] for r in c] for c in train]
        self.rollouts = float(np.mean([r.get("rollouts", 1) for c in train for r in c]))  # a step: above 1 with resampling


def build(config, root: Path, cells: Sequence[Any], seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """(data of the page, summary): compares the arms of every pool, paired over its cells (base policy x seed)."""
    baseline, main = config.arms[0], config.main_arm
    tables, curves, summary = [], [], {}
    for pool in config.pools:
        folders = [root / "cells" / c.name for c in cells if c.pool == pool]
        runs = {arm: ArmRuns(folders, arm) for arm in config.arms}
        bases = [c.base for c in cells if c.pool == pool]
        rows = [_arm_row(runs[arm], runs[baseline], runs[main], bases) for arm in config.arms]
        summary[pool] = {row["arm"]: row for row in rows}
        note = _note(len(folders), config) + ("" if _controls(config) else f" {UNCONTROLLED}")
        shown = [{key: value for key, value in row.items() if key not in ("by_base", "no_saving")} for row in rows]
        tables.append({"title": f"Arms, pool “{pool}”", "rows": shown, "note": note})
        curves.append(_curve_chart(runs, baseline, pool, len(folders)))
    first = root / "cells" / cells[0].name
    headline = _headline(config, summary, len([c for c in cells if c.pool == config.pools[0]]))
    data = {
        "title": config.title,
        "subtitle": "SAE-guided data for GRPO",
        "headline": headline,
        "facts": _facts(summary[config.pools[0]], main, baseline),
        "arms": [_arm_info(config, name) for name in config.arms],
        "curves": curves,
        "arms_tables": tables,
        "config": to_dict(config),
        "provenance": _provenance(config, first, cells, seconds),
    }
    data |= _cell_sections(config, first, cells[0])
    data["rollouts"] = _rollouts(config, first)
    return data, {"headline": headline, "pools": summary, "seconds": seconds}


def markdown(config, summary: dict[str, Any]) -> str:
    """The arms' tables of `build`'s summary as Markdown: what docs/saerl.md quotes."""
    main, baseline, lines = config.main_arm, config.arms[0], []

    def cell(e: Any, form: str, unit: str = "") -> str:
        if e is None:
            return ""
        return f"{_hundredths(e['value'], form)}{unit}" + (f" ({_span(e, form)})" if _span(e) else "")

    for pool, arms in summary["pools"].items():
        levels = list(next(iter(arms.values()))["per_level"])
        head = ["arm", "accuracy %", f"minus {baseline}", "by base policy", "steps saved", "mixed groups", f"{main} minus it"]
        head += [f"level {level}" for level in levels]
        resampled = any(row["rollouts"] > 1 for row in arms.values())
        head += ["rollouts a step"] if resampled else []
        lines += [f"Pool `{pool}`, {next(iter(arms.values()))['seeds']} paired runs", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for arm, row in arms.items():
            by_base = ", ".join(f"{100 * v:+.1f}" for v in row.get("by_base", {}).values())
            cells = [f"`{arm}`", f"{100 * row['accuracy']['value']:.1f}", cell(row.get("difference"), "+.1f"), by_base]
            cells += [cell(row.get("steps_saved"), ".0f", "%")]
            cells += [f"{row['mixed_groups']:.0%}", cell(row.get("main_minus"), "+.1f")] + [f"{100 * v:+.1f}" for v in row["per_level"].values()]
            cells += [f"{row['rollouts']:.2f}"] if resampled else []
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _arm_info(config, name: str) -> dict[str, str]:
    role = "baseline" if name == config.arms[0] else "main" if name == config.main_arm else "control" if "_" in name else "other"
    return {"name": name, "label": name.replace("_", " "), "role": role, "about": config.arm_table[name].about}


def _arm_row(arm: ArmRuns, baseline: ArmRuns, main: ArmRuns, bases: Sequence[int]) -> dict[str, Any]:
    """One row of the table. bases: the base policy of each cell."""
    target = baseline.curve[:, -1].mean()
    reached = steps_to_target(np.array(arm.steps), arm.curve.mean(axis=0), target)
    row = {
        "arm": arm.arm,
        "accuracy": {"value": float(np.nanmean(arm.items))},
        "steps_to_target": reached if np.isfinite(reached) and target > baseline.curve[:, 0].mean() else None,
        "per_level": {level: float((arm.levels[level] - baseline.levels[level]).mean()) for level in arm.levels},
        "mixed_groups": float(arm.mixed.mean()),
        "seeds": len(arm.items),
        "rollouts": arm.rollouts,
    }
    if arm is not baseline:
        row["difference"] = _estimate(paired_bootstrap(arm.items, baseline.items, bases))
        saved = steps_saved(np.array(arm.steps), arm.curve, baseline.curve, bases) if arm.steps == baseline.steps else None
        row["steps_saved"] = None if saved is None else _estimate(saved)
        if saved is None:
            worse = arm if arm.curve[:, -1].mean() < baseline.curve[:, -1].mean() else baseline
            unlike = f"{arm.arm} and {baseline.arm} were trained for different numbers of steps"
            row["no_saving"] = unlike if arm.steps != baseline.steps else f"{worse.arm} did not improve"
        apart = np.nanmean(np.where(np.isnan(arm.items) | np.isnan(baseline.items), np.nan, arm.items - baseline.items), axis=1)
        row["by_base"] = {str(b): float(apart[np.asarray(bases) == b].mean()) for b in dict.fromkeys(bases)}
    if arm is not main:
        row["main_minus"] = _estimate(paired_bootstrap(main.items, arm.items, bases))
    return row


def _estimate(interval: Interval) -> dict[str, float | None]:
    finite = lambda x: x if np.isfinite(x) else None  # noqa: E731
    return {"value": interval.estimate, "low": finite(interval.low), "high": finite(interval.high)}


def _hundredths(value: float, form: str = "+.1f") -> str:
    return f"{round(100 * value, 1) + 0.0:{form}}"  # + 0.0: no minus before a zero


def _span(estimate: dict[str, float | None], form: str = "+.1f") -> str:
    """The limits in hundredths: "+2.3 to +5.6"; empty where there are none."""
    low, high = estimate["low"], estimate["high"]
    return "" if low is None or high is None else f"{_hundredths(low, form)} to {_hundredths(high, form)}"


def _detail(estimate: dict[str, float | None]) -> str:
    return f"95% {_span(estimate)}" if _span(estimate) else ""


def _note(cells: int, config) -> str:
    if cells == 1:
        return (
            f"One cell: the interval is over items alone and says nothing of other seeds. Accuracy is avg@{config.grpo.eval_samples} at "
            "temperature 1 on clean held-out problems."
        )
    return (
        f"{cells} paired cells (base policy x seed); 95% by a crossed bootstrap over base policies, seeds and items. Accuracy is "
        f"avg@{config.grpo.eval_samples} at temperature 1 on clean held-out problems. Steps saved: on the curves' means, the share of the run "
        "that the better arm does not need to where the worse one ends; negative where the baseline is the better one."
    )


def _curve_chart(runs: dict[str, ArmRuns], baseline: str, pool: str, cells: int) -> dict[str, Any]:
    series = []
    for arm, run in runs.items():
        line = {"arm": arm, "steps": run.steps, "mean": run.curve.mean(axis=0)}
        if cells > 1:
            bounds = [paired_t(run.curve[:, i], np.zeros(cells)) for i in range(len(run.steps))]
            line |= {"low": [b.low for b in bounds], "high": [b.high for b in bounds]}
        series.append(line)
    target = float(runs[baseline].curve[:, -1].mean())
    reached = {arm: steps_to_target(np.array(run.steps), run.curve.mean(axis=0), target) for arm, run in runs.items()}
    marks = {arm: step if np.isfinite(step) else None for arm, step in reached.items()}
    chart = {
        "title": f"Held-out accuracy, pool “{pool}”",
        "series": series,
        "target": {"arm": baseline, "value": target, "steps": marks},
    }
    return chart | ({"band": f"95% t-interval over {cells} cells"} if cells > 1 else {})


def _headline(config, summary, cells: int) -> str:
    """Which arm was better, by how much, how sure, and why, in plain words made from the figures."""
    baseline, main = config.arms[0], config.main_arm
    if main == baseline:
        return f"{baseline}: held-out accuracy {summary[config.pools[0]][baseline]['accuracy']['value']:.1%}."
    parts = [_verdict(summary[pool][main], main, baseline, pool if len(config.pools) > 1 else "") for pool in config.pools]
    row, base = summary[config.pools[0]][main], summary[config.pools[0]][baseline]
    share, its = row["mixed_groups"], base["mixed_groups"]
    parts.append(f"Mixed rewards, the groups GRPO learns from: {share:.0%} against {its:.0%}.")
    parts.append(_attribution(config, summary))
    uncontrolled = "" if _controls(config) else " and no control of the SAE"
    parts.append(f"One seed{uncontrolled}: a demonstration, not evidence." if cells == 1 else f"{cells} paired runs{uncontrolled}.")
    return " ".join(p for p in parts if p)


def _verdict(row, main: str, baseline: str, pool: str) -> str:
    d, steps = row["difference"], row["steps_saved"]
    where = f"On “{pool}”, " if pool else ""
    if steps is None:
        saved = f"there is no saving of steps to speak of, since {row['no_saving']}"
    else:
        ahead, to = (main, baseline) if steps["value"] >= 0 else (baseline, main)
        saved = f"{ahead} is at {to}’s final accuracy with {abs(steps['value']):.0%} fewer steps"
    spread = f" (95% {_span(d)})" if _span(d) else ""
    if d["low"] is not None and d["low"] <= 0 <= d["high"]:
        return f"{where}{main} and {baseline} end within the noise of each other: {100 * d['value']:+.1f} points{spread}; {saved}."
    verb = "beats" if d["value"] > 0 else "loses to"
    return f"{where}{main} {verb} {baseline} by {abs(100 * d['value']):.1f} points{spread}; {saved}."


def _controls(config) -> list[str]:
    """Arms that differ from the main one by the features they go by."""
    main, table = config.main_arm, config.arm_table
    return [a for a in config.arms if a.startswith(f"{main}_") and "oracle" not in a and table[a].start == table[main].start]


def _attribution(config, summary) -> str:
    """Whether SAE features bring the gain: the main arm against the same arm on other features."""
    pool = config.pools[0]
    rivals = _controls(config)
    if not rivals:
        return ""
    best = max(rivals, key=lambda a: summary[pool][a]["accuracy"]["value"])
    gap, name = summary[pool][best]["main_minus"], best.replace("_", " ")
    points = f"{_hundredths(gap['value'])} points" + (f", 95% {_span(gap)}" if _span(gap) else "")
    if gap["low"] is None or gap["low"] <= 0 <= gap["high"]:
        return f"It is within the noise of its best control, {name} ({points})."
    return f"It {'beats' if gap['value'] > 0 else 'loses to'} its best control, {name} ({points})."


def _facts(rows, main: str, baseline: str) -> list[dict[str, str]]:
    row = rows[main]
    if "difference" not in row:
        return []
    d, s = row["difference"], row["steps_saved"]
    mixed = f"{row['mixed_groups']:.0%}"
    steps = {"value": "–", "detail": row.get("no_saving", "")}
    if s is not None:
        fewer = {"value": -s["value"], "low": None, "high": None}
        if s["low"] is not None:
            fewer |= {"low": -s["high"], "high": -s["low"]}
        steps = {"value": f"{100 * fewer['value']:+.0f}%", "detail": _detail(fewer)}
    return [
        {"label": f"{main} − {baseline}, final accuracy", "value": f"{100 * d['value']:+.1f} points", "detail": _detail(d)},
        {"label": f"steps of {main} to {baseline}’s final accuracy", **steps},
        {"label": "groups with mixed rewards", "value": mixed, "detail": f"{baseline} {rows[baseline]['mixed_groups']:.0%}"},
    ]


# --- sections of the first cell --------------------------------------------------------------------------------------


def _cell_sections(config, folder: Path, cell) -> dict[str, Any]:
    """Map, schedules, calibration, quality, signals and features of one cell."""
    signals, report = np.load(folder / "signals.npz", allow_pickle=False), json.loads((folder / "signals.json").read_text())
    page = json.loads((folder / "page.json").read_text())
    curated = CuratedSet.read(folder / "curated", "parquet")
    rows = np.asarray(page["rows"], int)
    out: dict[str, Any] = {"prompt_map": _map(signals, page, curated, rows), "features": page["features"]}
    difficulty, clusters = signals["difficulty/sae"], signals["clusters/sae"]
    shown = list(dict.fromkeys([config.arms[0], *[a for a in config.arms if a == "published"], config.main_arm]))
    out["schedules"] = [
        summarise.schedule(arm, ArmRuns([folder], arm).rows[0], difficulty, clusters) for arm in shown
    ]
    out["signals"] = _signal_tables(signals, report)
    if "truth/fail_rate" in signals:
        checked, fail = signals["truth/checked"], signals["truth/fail_rate"]
        out["calibration"] = summarise.calibration({"SAE proxy": difficulty[checked]}, fail)
    if "quality/sae" in signals and "truth/corruption" in signals:
        kinds = signals["truth/corruption"].astype(str)
        margin, kept = np.asarray(page["margin"]), curated.keep
        scores = {("clean" if k == "none" else k): margin[kinds == k] for k in sorted(set(kinds), key=lambda k: k != "none")}
        out["quality"] = {
            "scores": scores,
            "cut": 0.0,
            "label": "quality above the cut of its cluster and difficulty",
            "note": f"{int((~kept).sum())} of {len(kept)} rows dropped by the main arm",
        }
    return out


def _map(signals, page, curated: CuratedSet, rows: np.ndarray) -> dict[str, Any]:
    fields = [
        {"name": "cluster", "kind": "category", "values": [str(c) for c in signals["clusters/sae"][rows]]},
        {"name": "difficulty", "kind": "number", "percent": True, "values": signals["difficulty/sae"][rows]},
        {"name": "kept", "kind": "category", "values": ["kept" if k else "dropped" for k in curated.keep[rows]]},
    ]
    for name in ("topic", "level", "corruption"):
        if f"truth/{name}" in signals:
            fields.append({"name": name, "kind": "category", "values": [str(v) for v in signals[f"truth/{name}"][rows]]})
    prompts = [curated.rows[i]["prompt"] for i in rows]
    return {"x": page["map"]["x"], "y": page["map"]["y"], "prompts": prompts, "fields": fields, "method": page["map"]["method"]}


def _signal_tables(signals, report) -> list[dict[str, Any]]:
    """Each signal against the truth, beside its baselines."""
    tables = []
    if report.get("clusters"):
        rows = [{"name": k, "cells": [{"value": v}], "kind": "ours" if k == "sae" else "baseline"} for k, v in report["clusters"].items()]
        tables.append({"title": "Diversity", "metric": "NMI of clusters with topic", "columns": ["topic"], "rows": rows})
    if "difficulty" in report:
        probes = report["difficulty"]["probes"]
        rows = [
            {"name": name, "cells": [_cell(p)], "kind": "ours" if name.startswith("sae/") else "baseline"}
            for name, p in probes.items()
            if name.removeprefix("length_") == name or name.removeprefix("length_") not in probes  # one baseline under two names
        ]
        note = f"{report['difficulty']['labels']['used']} rows labelled by rollouts of the base policy; cross-validated"
        if "truth/fail_rate" in signals:
            held = spearman(signals["difficulty/sae"][signals["truth/checked"]], signals["truth/fail_rate"])
            note += f"; on rows that no probe saw, the SAE proxy has {held:.3f}"
        metric = "Spearman with the measured fail rate"
        tables.append({"title": "Difficulty", "metric": metric, "columns": ["labelled rows"], "rows": rows, "note": note})
    if "quality" in report and "truth/corruption" in signals:
        tables.append(_quality_table(signals, report))
    return tables


def _quality_table(signals, report) -> dict[str, Any]:
    """Every probe on the rows told, out of fold; those that give a filter its quality also on all rows, by kind of corruption."""
    kinds = signals["truth/corruption"].astype(str)
    clean = kinds == "none"
    bad = [k for k in sorted(set(kinds)) if k not in ("none", "near_duplicate")]
    probes = {name: p for name, p in report["quality"]["probes"].items() if name != "length_tfidf"}  # that is tfidf_alone
    scored = [n.split("/")[1] for n in signals.files if n.startswith("quality/")]
    rows = []
    for name in dict.fromkeys([*scored, *probes]):
        cells = [_cell(probes[name]) if name in probes else None] + [None] * len(bad)
        if name in scored:
            scores = signals[f"quality/{name}"]
            cells[1:] = [{"value": auroc(scores[clean | (kinds == k)], clean[clean | (kinds == k)].astype(float))} for k in bad]
        rows.append({"name": name, "cells": cells, "kind": "ours" if name == "sae" else "baseline"})
    labels = report["quality"]["counts"]["labels"]
    names = {*scored, *probes}
    return {
        "title": "Quality",
        "metric": "AUROC, clean against corrupted",
        "columns": ["rows told, out of fold", *(k.replace("_", " ") for k in bad)],
        "rows": rows,
        "note": f"{labels} rows told; by kind of corruption over all rows, for the probes that gave an arm its filter. logprob is what the policy "
        "thinks of the answer"
        + (", tuned adds what it gains in policies tuned on the rows told to be sound" if "tuned" in names else "")
        + "; sae, random sae, dense and tfidf join this with features of prompt + answer, sae alone, tfidf alone and length have none of it",
    }


def _cell(p: dict[str, float]) -> dict[str, float | None]:
    return {"value": p["value"], "low": p.get("low"), "high": p.get("high")}


# --- samples and provenance ------------------------------------------------------------------------------------------


def _rollouts(config, folder: Path, prompts: int = 24) -> list[dict[str, Any]]:
    """Held-out prompts with the greedy answers of the base policy and of each shown arm (made by the experiment)."""
    path = folder / "rollouts.json"
    return json.loads(path.read_text())[:prompts] if path.exists() else []


def _provenance(config, folder: Path, cells, seconds: float) -> dict[str, Any]:
    import flax
    import jax
    import optax

    stages = json.loads((folder / "stages.json").read_text())
    return {
        "versions": {m.__name__: m.__version__ for m in (jax, flax, optax)} | {"jaxrl_llm": __version__, "python": sys.version.split()[0]},
        "seeds": list(config.seeds),
        "stages": [{"name": name, "seconds": s} for name, s in stages.items()],
        "seconds": seconds,
        "other": {"device": jax.devices()[0].device_kind, "cells": len(cells), "stages of": cells[0].name},
    }  # fmt: skip
