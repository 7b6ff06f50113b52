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
from jaxrl_llm.evals.statistics import Interval, paired_bootstrap, paired_t, steps_to_target
from jaxrl_llm.report import summarise

SMOOTH = 3  # evaluations in the moving average of steps-to-target


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

    def to_target(self, target: np.ndarray) -> np.ndarray:
        """[cells] steps to each cell's target, inf where never reached."""
        return np.array([steps_to_target(np.array(self.steps), c, t, window=SMOOTH) for c, t in zip(self.curve, target, strict=True)])


def build(config, root: Path, cells: Sequence[Any], seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """(data of the page, summary): compares the arms of every pool, paired over its cells (base policy x seed)."""
    baseline, main = config.arms[0], config.main_arm
    tables, curves, summary = [], [], {}
    for pool in config.pools:
        folders = [root / "cells" / c.name for c in cells if c.pool == pool]
        runs = {arm: ArmRuns(folders, arm) for arm in config.arms}
        rows = [_arm_row(runs[arm], runs[baseline]) for arm in config.arms]
        summary[pool] = {row["arm"]: row for row in rows}
        note = _note(len(folders), config)
        shown = [{k: v for k, v in row.items() if k != "bootstrap"} for row in rows]
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


def _arm_info(config, name: str) -> dict[str, str]:
    role = "baseline" if name == config.arms[0] else "main" if name == config.main_arm else "control" if "_" in name else "other"
    return {"name": name, "label": name.replace("_", " "), "role": role, "about": config.arm_table[name].about}


def _difference(arm: ArmRuns, baseline: ArmRuns) -> Interval:
    """Accuracy difference: Student's t over cells, wherever there are two; over items alone for a single cell. An item that has no
    verdict in one arm counts in neither."""
    if len(arm.items) > 1:
        both = np.where(np.isnan(arm.items) | np.isnan(baseline.items), np.nan, 1.0)
        return paired_t(np.nanmean(arm.items * both, axis=1), np.nanmean(baseline.items * both, axis=1))
    return paired_bootstrap(arm.items, baseline.items)


def _steps_saved(arm: ArmRuns, baseline: ArmRuns, target: np.ndarray) -> Interval | None:
    """Share of the baseline's steps that the arm does not need to get to `target` [cells]. None where the baseline itself ends no
    higher than it began in some cell: then nothing was to be reached. A cell in which the arm never gets there counts as the
    whole run: the saving is understated, never overstated."""
    if not (target > baseline.curve[:, 0] + 1e-9).all():
        return None
    own, its = np.minimum(arm.to_target(target), float(arm.steps[-1])), baseline.to_target(target)
    return paired_t(1 - own / np.maximum(its, 1e-9), np.zeros(len(own)))


def _arm_row(arm: ArmRuns, baseline: ArmRuns) -> dict[str, Any]:
    """One row of the table. Steps saved compares like with like: the baseline's own smoothed curve to its own final value."""
    target = baseline.curve[:, -SMOOTH:].mean(axis=1)
    own, saved = arm.to_target(target), _steps_saved(arm, baseline, target)
    reached = float(np.mean(own)) if np.isfinite(own).all() and saved is not None else None
    row = {
        "arm": arm.arm,
        "accuracy": {"value": float(np.nanmean(arm.items))},
        "steps_to_target": reached,
        "per_level": {level: float((arm.levels[level] - baseline.levels[level]).mean()) for level in arm.levels},
        "mixed_groups": float(arm.mixed.mean()),
        "seeds": len(arm.items),
    }
    if arm is not baseline:
        d, both = _difference(arm, baseline), paired_bootstrap(arm.items, baseline.items, draws=2000)
        row["difference"] = _estimate(d)
        row["steps_saved"] = None if saved is None else _estimate(saved)
        row["bootstrap"] = [both.low, both.high]
    return row


def _estimate(interval: Interval) -> dict[str, float | None]:
    finite = lambda x: x if np.isfinite(x) else None  # noqa: E731
    return {"value": interval.estimate, "low": finite(interval.low), "high": finite(interval.high)}


def _note(cells: int, config) -> str:
    if cells == 1:
        return (
            f"One cell: the interval is over items alone and says nothing of other seeds. Accuracy is avg@{config.grpo.eval_samples} at "
            "temperature 1 on clean held-out problems."
        )
    return (
        f"{cells} paired cells (base policy x seed); 95% t-intervals over cells. Accuracy is avg@{config.grpo.eval_samples} at temperature 1 "
        f"on clean held-out problems. Steps to target: a moving average of {SMOOTH} evaluations reaches the baseline's own final average; "
        "a cell that never does counts as the whole run."
    )


def _curve_chart(runs: dict[str, ArmRuns], baseline: str, pool: str, cells: int) -> dict[str, Any]:
    series = []
    for arm, run in runs.items():
        line = {"arm": arm, "steps": run.steps, "mean": run.curve.mean(axis=0)}
        if cells > 1:
            bounds = [paired_t(run.curve[:, i], np.zeros(cells)) for i in range(len(run.steps))]
            line |= {"low": [b.low for b in bounds], "high": [b.high for b in bounds]}
        series.append(line)
    target = runs[baseline].curve[:, -SMOOTH:].mean(axis=1)
    reached = {arm: run.to_target(target) for arm, run in runs.items()}
    marks = {arm: float(s.mean()) if np.isfinite(s).all() else None for arm, s in reached.items()}
    chart = {
        "title": f"Held-out accuracy, pool “{pool}”",
        "series": series,
        "target": {"arm": baseline, "value": float(target.mean()), "steps": marks},
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
    parts.append("One seed: a demonstration, not evidence." if cells == 1 else f"{cells} paired runs.")
    return " ".join(p for p in parts if p)


def _verdict(row, main: str, baseline: str, pool: str) -> str:
    d, steps = row["difference"], row["steps_saved"]
    where = f"On “{pool}”, " if pool else ""
    if steps is None:
        saved = f"no saving of steps to speak of, since {baseline} did not improve"
    else:
        saved = f"{abs(steps['value']):.0%} {'fewer' if steps['value'] >= 0 else 'more'} steps to {baseline}’s final accuracy"
    spread = "" if d["low"] is None else f" (95% {100 * d['low']:+.1f} to {100 * d['high']:+.1f})"
    if d["low"] is not None and d["low"] <= 0 <= d["high"]:
        return f"{where}{main} and {baseline} end within the noise of each other: {100 * d['value']:+.1f} points{spread}, {saved}."
    verb = "beats" if d["value"] > 0 else "loses to"
    return f"{where}{main} {verb} {baseline} by {abs(100 * d['value']):.1f} points{spread}, with {saved}."


def _attribution(config, summary) -> str:
    """Whether SAE features bring the gain: the main arm against the same arm on other features."""
    main, rivals = config.main_arm, [a for a in config.arms if a.startswith(f"{config.main_arm}_") and "oracle" not in a]
    if not rivals:
        return ""
    pool = config.pools[0]
    best = max(rivals, key=lambda a: summary[pool][a]["accuracy"]["value"])
    gap = 100 * (summary[pool][main]["accuracy"]["value"] - summary[pool][best]["accuracy"]["value"])
    verb = "beats" if gap > 0 else "does not beat"
    return f"It {verb} its best control, {best.replace('_', ' ')} ({gap:+.1f} points)."


def _facts(rows, main: str, baseline: str) -> list[dict[str, str]]:
    row = rows[main]
    if "difference" not in row:
        return []
    d, s = row["difference"], row["steps_saved"]
    mixed = f"{row['mixed_groups']:.0%}"
    steps = {"value": "–", "detail": f"{baseline} did not improve"}
    if s is not None:
        steps = {"value": f"{-100 * s['value']:+.0f}%", "detail": _limits(s, -100)}
    return [
        {"label": f"{main} − {baseline}, final accuracy", "value": f"{100 * d['value']:+.1f} points", "detail": _limits(d, 100)},
        {"label": f"steps to {baseline}’s final accuracy", **steps},
        {"label": "groups with mixed rewards", "value": mixed, "detail": f"{baseline} {rows[baseline]['mixed_groups']:.0%}"},
    ]


def _limits(estimate, scale: float) -> str:
    if estimate["low"] is None:
        return ""
    low, high = sorted((scale * estimate["low"], scale * estimate["high"]))
    return f"95% {low:+.1f} to {high:+.1f}"


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
            {
                "name": name,
                "cells": [_cell(p)],
                "kind": "ours" if name.startswith("sae/") else "baseline",
            }
            for name, p in probes.items()
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
    kinds = signals["truth/corruption"].astype(str)
    clean = kinds == "none"
    bad = [k for k in sorted(set(kinds)) if k not in ("none", "near_duplicate")]
    names = [n.split("/")[1] for n in signals.files if n.startswith("quality/")]
    rows = []
    for name in names:
        scores = signals[f"quality/{name}"]
        cells = [{"value": auroc(scores[clean | (kinds == k)], clean[clean | (kinds == k)].astype(float))} for k in bad]
        rows.append({"name": name, "cells": cells, "kind": "ours" if name == "sae" else "baseline"})
    labels = report["quality"]["counts"]["labels"]
    return {
        "title": "Quality",
        "metric": "AUROC, clean against corrupted",
        "columns": [k.replace("_", " ") for k in bad],
        "rows": rows,
        "note": f"{labels} rows told. logprob is what the policy thinks of the answer"
        + (", tuned adds what it gains in policies tuned on the rows told to be sound" if "tuned" in names else "")
        + "; sae, random sae and dense join this with features of prompt + answer, tfidf has none of it",
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
