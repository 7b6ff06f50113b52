"""The pages of `jaxrl-llm eval` for SAEs: one an SAE, and one that puts several side by side at like L0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.report.svg import interval, number

MATCHED = 1.5  # SAEs whose L0 are within this factor of the sparsest of them are compared in one table

# (title, what it is, whether more is better, figures with their names): a table each.
TABLES: tuple[tuple[str, str, bool | None, dict[str, str]], ...] = (
    (
        "What the model keeps",
        "with the reconstruction in the tap’s place",
        True,
        {
            "ce_recovered": "CE recovered (zero)", "ce_recovered_mean": "CE recovered (mean)", "kl_recovered": "KL recovered (zero)",
            "kl_recovered_mean": "KL recovered (mean)",
        },
    ),
    (
        "Reconstruction",
        "of the activations",
        None,
        {
            "explained_variance": "explained variance", "explained_variance_legacy": "legacy, per token", "cossim": "cosine",
            "l2_ratio": "norm out / in", "relative_reconstruction_bias": "relative bias", "mse": "squared error",
        },
    ),
    (
        "Sparsity and density",
        "of the latents",
        None,
        {
            "l0": "L0", "l1": "L1", "dead_share": "dead", "freq_over_1_percent": "on > 1% of tokens", "freq_over_10_percent": "on > 10%",
            "normalized_freq_over_10_percent": "firing by those",
        },
    ),
    (
        "Cross-entropy and divergence",
        "nats a predicted token",
        None,
        {
            "ce_clean": "CE clean", "ce_sae": "CE with SAE", "ce_mean": "CE, mean", "ce_zero": "CE, zero", "kl_sae": "KL with SAE",
            "kl_mean": "KL, mean", "kl_zero": "KL, zero",
        },
    ),
    (
        "Geometry",
        "of the weights",
        None,
        {
            "average_max_decoder_cosine_sim": "largest cosine of decoder rows", "average_max_encoder_cosine_sim": "of encoder columns",
            "encoder_decoder_cosine_sim": "encoder with decoder", "decoder_norm": "decoder norm",
        },
    ),
)  # fmt: skip
MATCHED_FIGURES = {
    "explained_variance": "explained variance", "cossim": "cosine", "ce_recovered": "CE recovered", "kl_recovered": "KL recovered",
}  # fmt: skip
MARKED = 5  # columns from which the marks beside figures go, so that a table fits
METHODS = {"sae_top_k": "k SAE latents", "llm_top_k": "k raw dimensions", "diff_mean": "DiffMean", "dense": "dense probe", "majority": "majority"}
ABSORPTION = {
    "mean_absorption_fraction_score": "absorbed fraction", "mean_full_absorption_score": "full absorption",
    "mean_num_split_features": "main latents a letter", "mean_probe_f1": "F1 of the dense probe",
}  # fmt: skip


def sae_page(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The page data of one SAE's record."""
    sae, data = record["sae"], record["data"]
    page: dict[str, Any] = {
        "kind": "eval",
        "title": record["name"],
        "subtitle": "jaxrl-llm eval: sparse autoencoder",
        "headline": _headline(record),
        "facts": _facts(record),
        "tables": [*_tables([record]), *_probe_tables(record), *_tpp_tables([record]), *_absorption_tables([record]), *_letter_tables(record)],
        "plots": _probe_plots([record]),
        "densities": [{"label": "latents", **record["density"]}],
        "config": dict(config),
        "provenance": {
            "versions": record.get("versions", {}),
            "stages": [{"name": name, "seconds": seconds} for name, seconds in record["seconds"].items()],
            "seconds": float(sum(record["seconds"].values())),
            "other": {
                "SAE": record["source"], **{key: value for key, value in sae.items() if value is not None}, "data": dict(data),
                **{f"left out: {name}": why for name, why in record.get("left_out", {}).items()},
            },
        },
    }  # fmt: skip
    return {key: value for key, value in page.items() if value != []}


def comparison_page(records: Sequence[Mapping[str, Any]], config: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The page data of several SAEs, sparsest first; tables are of SAEs of like L0."""
    records = sorted(records, key=lambda record: record["figures"]["l0"]["value"])
    groups = matched(records)
    tables = [*_matched_tables(groups), *_tables(records), *_tpp_tables(records), *_absorption_tables(records)]
    one = len(records) == 1
    page: dict[str, Any] = {
        "kind": "eval",
        "title": f"SAE evaluation: {title}",
        "subtitle": "jaxrl-llm eval",
        "headline": _headline(records[0]) if one else _best_line(groups),
        "facts": _facts(records[0]) if one else [],
        "tables": tables,
        "plots": [*_frontier(records), *_probe_plots(records)],
        "densities": [{"label": record["name"], **record["density"]} for record in records],
        "config": dict(config),
        "provenance": {
            "versions": records[-1].get("versions", {}),
            "seconds": float(sum(sum(record["seconds"].values()) for record in records)),
            "stages": [{"name": record["name"], "seconds": float(sum(record["seconds"].values()))} for record in records],
            "other": {record["name"]: record["source"] for record in records} | {"data": dict(records[0]["data"])},
        },
    }
    return {key: value for key, value in page.items() if value != []}


def matched(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Records, sparsest first, in groups whose L0 are within MATCHED of the group's first."""
    groups: list[list[Mapping[str, Any]]] = []
    for record in records:
        l0 = record["figures"]["l0"]["value"]
        if groups and l0 <= MATCHED * groups[-1][0]["figures"]["l0"]["value"]:
            groups[-1].append(record)
        else:
            groups.append([record])
    return groups


def _l0(record: Mapping[str, Any]) -> str:
    return number(record["figures"]["l0"]["value"])


def _value(record: Mapping[str, Any], name: str) -> float | None:
    return record["figures"].get(name, {}).get("value")


def _headline(record: Mapping[str, Any]) -> str:
    figures = [("explained_variance", "{} of the variance is explained"), ("ce_recovered", "{} of the cross-entropy is recovered")]
    told = [text.format(number(value, percent=True)) for name, text in figures if (value := _value(record, name)) is not None]
    dead = number(_value(record, "dead_share"), percent=True)
    return f"With {_l0(record)} latents a token, {' and '.join(told)}; {dead} of latents never fire."


def _best_line(groups: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Of each group of like L0, which SAE keeps most of what the model does."""
    parts = []
    for group in groups:
        name = "ce_recovered" if _value(group[0], "ce_recovered") is not None else "explained_variance"
        best = max(group, key=lambda record: _value(record, name) or float("-inf"))
        what = "of the cross-entropy" if name == "ce_recovered" else "of the variance"
        kept = number(_value(best, name), percent=True)
        parts.append(f"{best['name']} keeps {'most, ' if len(group) > 1 else ''}{kept} {what}, at L0 {_l0(best)}")
    return "; ".join(parts) + "."


def _facts(record: Mapping[str, Any]) -> list[dict[str, str]]:
    wanted = {"explained_variance": "explained variance", "ce_recovered": "CE recovered", "kl_recovered": "KL recovered", "l0": "L0"}
    facts = []
    for name, label in wanted.items():
        found = record["figures"].get(name)
        if found and found["value"] is not None:
            digits, cell = None if name == "l0" else 3, _cell(found) or {}
            span = interval(cell.get("low"), cell.get("high"), digits=digits)
            facts.append({"label": label, "value": number(found["value"], digits=digits), "detail": f"95% {span}" if span else ""})
    return facts


def _cell(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not found or found.get("value") is None:
        return None
    low, high = found.get("low"), found.get("high")
    return {"value": found["value"], "low": low, "high": high} if low != high else {"value": found["value"]}  # the same in every resample


def _tables(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tables of TABLES that some SAE has figures for: a row an SAE."""
    tables = []
    for title, metric, better, names in TABLES:
        table = _table(records, names)
        if table["columns"]:
            several = len(records) > 1
            how = {"higher_is_better": better if several else None, "marks": several and len(table["columns"]) < MARKED}
            tables.append({"title": title, "metric": metric, **table, **how})
    return tables


def _table(records: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, Any]:
    """Columns of those figures that some SAE has, and rows."""
    shown = {name: label for name, label in names.items() if any(_value(record, name) is not None for record in records)}
    rows = [{"name": record["name"], "cells": [_cell(record["figures"].get(name)) for name in shown], "kind": "ours"} for record in records]
    return {"columns": list(shown.values()), "rows": rows}


def _matched_tables(groups: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """What SAEs of like L0 keep, a table a group of two or more."""
    tables = []
    for group in groups:
        if len(group) > 1:
            table = _table(group, MATCHED_FIGURES)
            for record, row in zip(group, table["rows"], strict=True):
                row["name"] += f" (L0 {_l0(record)})"
            ends = list(dict.fromkeys([_l0(group[0]), _l0(group[-1])]))
            tables.append({"title": f"At L0 {' to '.join(ends)}", "metric": "SAEs that may be compared: equally sparse", **table})
    return tables


def _method(row: Mapping[str, Any]) -> str:
    name = METHODS[row["method"]]
    return name if row["k"] is None else name.replace("k ", f"{row['k']} ", 1).removesuffix("s" if row["k"] == 1 else " ")


def _probe_tables(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    probe = record.get("probe")
    if not probe:
        return []
    kinds = {"sae_top_k": "ours", "majority": "bound"}
    rows = []
    for row in probe["methods"]:
        told = ("accuracy",) if row["method"] == "majority" else ("accuracy", "auroc", "f1")  # it ranks nothing
        cells = [_cell(row[name]) if name in told else None for name in ("accuracy", "auroc", "f1")]
        rows.append({"name": _method(row), "cells": cells, "kind": kinds.get(row["method"], "baseline")})
    classes = f"{len(probe['classes'])} classes, {number(probe['train'])} texts to train on, {number(probe['test'])} to test on"
    note = f"{classes}; one class against the rest, as many of each; means over classes."
    return [{"title": "Probes", "metric": "on texts not trained on", "columns": ["accuracy", "AUROC", "F1"], "rows": rows, "note": note}]


def _probe_plots(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy over k: each SAE's latents, the raw dimensions, and the dense baselines as levels (of the first SAE with probes)."""
    probed = [record for record in records if record.get("probe")]
    if not probed:
        return []

    def points(record: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
        rows = sorted((row for row in record["probe"]["methods"] if row["method"] == method), key=lambda row: row["k"])
        return [{"x": row["k"], **(_cell(row["accuracy"]) or {"value": None})} for row in rows]

    one = len(probed) == 1
    series: list[dict[str, Any]] = [
        {"label": METHODS["sae_top_k"] if one else record["name"], "points": points(record, "sae_top_k"), **({"kind": "ours"} if one else {})}
        for record in probed
    ]
    series.append({"label": METHODS["llm_top_k"], "points": points(probed[0], "llm_top_k"), "kind": "baseline"})
    levels = [
        {"label": METHODS[row["method"]], "value": row["accuracy"]["value"]}
        for row in probed[0]["probe"]["methods"]
        if row["method"] in ("diff_mean", "dense", "majority") and row["accuracy"]["value"] is not None
    ]
    same = len({record["sae"]["hook_name"] for record in probed}) == 1
    note = "" if same else f"Raw dimensions and levels are those of {probed[0]['sae']['hook_name']}."
    plot = {"title": "Probing accuracy", "x_label": "k", "x_log": True, "percent": True, "series": series, "levels": levels, "note": note}
    return [plot]


def _frontier(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is kept over L0, a point an SAE."""
    if len(records) < 2:
        return []
    wanted = {"explained_variance": "Explained variance", "ce_recovered": "Cross-entropy recovered (zero ablation)"}
    plots = []
    for name, title in wanted.items():
        series = [
            {"label": record["name"], "points": [{"x": _value(record, "l0"), **(_cell(record["figures"][name]) or {"value": None})}]}
            for record in records
            if name in record["figures"]
        ]
        if series:
            plots.append({"title": title, "x_label": "L0", "x_log": True, "percent": True, "series": series})
    return plots


def _tpp_tables(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Targeted probe perturbation by the number of latents taken out: of several SAEs tpp alone, of one its two parts too."""
    found = [record for record in records if record.get("tpp")]
    if not found:
        return []
    note = "What taking a class’s n latents, or its DiffMean direction, out costs its own probe, less what it costs the others’."
    columns = sorted({n for record in found for n in record["tpp"]}, key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0))
    shown = ["DiffMean" if n == "diff_mean" else f"n = {n}" for n in columns]
    if len(found) > 1 or len(records) > 1:
        rows = [{"name": r["name"], "cells": [_cell(r["tpp"].get(n, {}).get("tpp")) for n in columns], "kind": "ours"} for r in found]
    else:
        parts = {"tpp": "difference", "intended": "own probe", "unintended": "others’ probes"}
        kinds = {"tpp": "ours"}
        rows = [
            {"name": label, "cells": [_cell(found[0]["tpp"][n][part]) for n in columns], "kind": kinds.get(part, "baseline")}
            for part, label in parts.items()
        ]
    table = {"title": "Targeted probe perturbation", "metric": "drop in accuracy", "columns": shown, "rows": rows, "note": note}
    return [table | {"higher_is_better": None, "marks": False}]


def _absorption_tables(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [record for record in records if record.get("absorption")]
    if not found:
        return []
    rows = [{"name": r["name"], "cells": [_cell(r["absorption"]["figures"][name]) for name in ABSORPTION], "kind": "ours"} for r in found]
    metric, columns = "first letters of tokens, means over letters", list(ABSORPTION.values())
    return [{"title": "Feature absorption", "metric": metric, "columns": columns, "rows": rows, "higher_is_better": None, "marks": len(found) > 1}]


def _letter_tables(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    absorption = record.get("absorption")
    if not absorption:
        return []
    names = {"probe_f1": "F1, dense probe", "f1_1": "F1, one latent", "main": "main latents", "fraction": "absorbed fraction"}
    names["full"] = "full absorption"
    rows = []
    for letter in absorption["letters"]:
        figures = letter | {"main": len(letter["main"]), "f1_1": letter["sparse_f1"][0]}
        cells = [None if figures[name] is None else {"value": float(figures[name])} for name in names]
        rows.append({"name": f"{letter['letter']} ({letter['rows']})", "cells": cells, "kind": "baseline"})
    note = "In brackets: test rows that the dense probe gets right, on which absorption is counted."
    table = {"title": "Absorption by letter", "metric": "", "columns": list(names.values()), "rows": rows}
    return [table | {"higher_is_better": None, "marks": False, "note": note}]
