"""The page of a `jaxrl-llm curate` run: what was kept, in which order, and how far each signal can be trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.curation.curated_set import CuratedSet
from jaxrl_llm.curation.interpret import plane
from jaxrl_llm.errors import UserError
from jaxrl_llm.report import summarise

MAP_PROMPTS = 1500  # points on the map
BATCHES = 400  # of each order, drawn
CURATED, SHUFFLED = "curated", "shuffled"


def curate_page(path: Path, head: Mapping[str, Any], title: str = "") -> dict[str, Any]:
    """The page data of the workdir `path`, whose config.json is `head`. Raises UserError where the run has not come to its end."""
    if not (path / "signals.json").is_file() or not (path / "vectors.npz").is_file():
        raise UserError(f"{path} holds a curate run that did not finish: the same command goes on with it")
    signals = json.loads((path / "signals.json").read_text(encoding="utf-8"))
    curated, config = CuratedSet.read(path / "curated"), head["config"]
    with np.load(path / "vectors.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    data: dict[str, Any] = {
        "kind": "run",
        "title": title or f"curate: {path.resolve().name}",
        "subtitle": "jaxrl-llm curate",
        "headline": _headline(signals),
        "facts": _facts(signals),
        "arms": [
            {"name": SHUFFLED, "label": SHUFFLED, "role": "baseline", "about": "the kept rows at random"},
            {"name": CURATED, "label": CURATED, "role": "main", "about": f"the kept rows in the order '{config['schedule']['kind']}'"},
        ],
        "schedules": _schedules(curated, config["schedule"]["batch_size"], config["seed"]),
        "signals": _tables(signals),
        "config": config,
        "provenance": {
            "versions": curated.manifest.get("versions", {}),
            "stages": [{"name": name, "seconds": seconds} for name, seconds in signals["seconds"].items()],
            "seconds": float(sum(signals["seconds"].values())),
            "other": {"rows": curated.manifest["data"], "model": curated.manifest["model"], "SAE": curated.manifest["sae"]},
        },
    }
    if len(curated.rows) > 2 and arrays["vectors"].shape[1] > 1:
        data["prompt_map"] = _map(curated, arrays["vectors"], config["data"]["topic"])
    if (cut := signals["filter"]["cut"]) is not None:
        data["quality"] = _quality(curated, arrays.get("told"), cut, signals["quality"]["used"])
    return data


def _best(report: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The probe that is used and its figures."""
    probes = report.get("probes") or {}
    return (report["used"], probes[report["used"]]) if report.get("used") in probes else None


def _measure(signals: Mapping[str, Any], group: str) -> str:
    return "Spearman" if group == "difficulty" or signals["quality"].get("measure") == "spearman" else "AUROC"


def _headline(signals: Mapping[str, Any]) -> str:
    kept, rows = signals["filter"]["kept"], signals["data"]["rows"]
    parts = [f"{kept:,} of {rows:,} rows are kept."]
    for group in ("difficulty", "quality"):
        if (found := _best(signals[group])) is None:
            continue
        name, figures = found
        reference = signals[group].get("reference")
        said = f"{group.capitalize()} by {_plain(name)}: {_measure(signals, group)} {figures['value']:.2f}"
        if reference in signals[group]["probes"] and reference != name:
            other = signals[group]["probes"][reference]["value"]
            said += f", by {_plain(reference)} {other:.2f}" + (", which says more" if other > figures["value"] else "")
        parts.append(said + ".")
    return " ".join(parts)


def _plain(name: str) -> str:
    """A probe's name without its kind of fit: "length + TF-IDF" of "length_tfidf/ridge"."""
    return name.partition("/")[0].replace("length_tfidf", "length + TF-IDF").replace("sae", "SAE")


def _facts(signals: Mapping[str, Any]) -> list[dict[str, str]]:
    dropped = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in signals["filter"]["dropped"].items() if n)
    facts = [{"label": "rows kept", "value": f"{signals['filter']['kept']:,}", "detail": f"dropped: {dropped or 'none'}"}]
    for group in ("difficulty", "quality"):
        if (found := _best(signals[group])) is not None:
            low, high = found[1].get("low"), found[1].get("high")
            detail = "" if low is None else f"95% {low:.2f} to {high:.2f}"
            label = f"{group} by {_plain(found[0])}, {_measure(signals, group)}"
            facts.append({"label": label, "value": f"{found[1]['value']:.2f}", "detail": detail})
    return facts


def _map(curated: CuratedSet, vectors: np.ndarray, topic: str) -> dict[str, Any]:
    rows = np.sort(np.random.default_rng(0).permutation(len(curated.rows))[:MAP_PROMPTS])
    drawn = plane(vectors[rows])
    fields: list[dict[str, Any]] = [
        {"name": "cluster", "kind": "category", "values": [str(c) if c >= 0 else "none" for c in curated.cluster[rows]]},
        {"name": "difficulty", "kind": "number", "percent": True, "values": curated.difficulty[rows]},
        {"name": "quality", "kind": "number", "values": curated.quality[rows]},
        {"name": "kept", "kind": "category", "values": ["kept" if keep else "dropped" for keep in curated.keep[rows]]},
    ]
    if topic:
        fields.append({"name": topic, "kind": "category", "values": [str(curated.rows[i].get(topic)) for i in rows]})
    prompts = [curated.rows[i]["prompt"] for i in rows]
    return {"x": drawn["x"], "y": drawn["y"], "prompts": prompts, "fields": fields, "method": drawn["method"]}


def _schedules(curated: CuratedSet, batch_size: int, seed: int) -> list[dict[str, Any]]:
    kept = np.flatnonzero(curated.keep)
    orders = {SHUFFLED: np.random.default_rng(seed).permutation(kept), CURATED: kept[np.argsort(curated.order[kept])]}
    size = max(batch_size, -(-len(kept) // BATCHES))  # of a large set several batches are drawn as one
    batches = {name: [order[i : i + size] for i in range(0, len(order), size)] for name, order in orders.items()}
    return [dict(summarise.schedule(name, found, curated.difficulty, curated.cluster)) for name, found in batches.items()]


def _tables(signals: Mapping[str, Any]) -> list[dict[str, Any]]:
    tables = []
    clusters = {name: f for name, f in signals["diversity"].items() if isinstance(f, dict) and "nmi" in f}
    if clusters:
        rows = [{"name": name, "cells": [{"value": f["nmi"]}], "kind": _kind(name)} for name, f in clusters.items()]
        tables.append({"title": "Diversity", "metric": "NMI of clusters with topic", "columns": ["topic"], "rows": rows})
    for group in ("difficulty", "quality"):
        probes = signals[group].get("probes") or {}
        if probes:
            cell = lambda f: {"value": f["value"], "low": f.get("low"), "high": f.get("high")}  # noqa: E731
            rows = [{"name": name, "cells": [cell(f)], "kind": _kind(name)} for name, f in sorted(probes.items(), key=lambda item: -item[1]["value"])]
            note = f"used: {signals[group]['used']}"
            table = {"title": group.capitalize(), "metric": f"{_measure(signals, group)}, out of fold", "columns": ["labelled rows"], "rows": rows}
            tables.append(table | {"note": note})
    return tables


def _kind(name: str) -> str:
    return "ours" if name.partition("/")[0].partition("+")[0] == "sae" else "baseline"


def _quality(curated: CuratedSet, told: np.ndarray | None, cut: float, used: str) -> dict[str, Any]:
    """Quality by what was told of the rows, where something was."""
    groups = {"all rows": np.ones(len(curated.rows), bool)}
    if told is not None:
        groups = {"told sound": told == 1, "told unsound": told == 0, "not told": np.isnan(told)}
    scores = {name: curated.quality[rows] for name, rows in groups.items() if rows.any()}
    dropped = int((~curated.keep).sum())
    return {
        "scores": scores, "cut": cut, "label": f"quality by {used}", "clean": next(iter(scores)),
        "note": f"{dropped} of {len(curated.rows)} rows dropped, those with a fault among them",
    }  # fmt: skip
