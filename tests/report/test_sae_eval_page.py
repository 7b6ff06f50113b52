"""The pages of `jaxrl-llm eval` for dictionaries: like L0 side by side, charts, and what a browser makes of them."""

import copy
import json

import numpy as np
import pytest
from browser import assert_whole

from jaxrl_llm.errors import UserError
from jaxrl_llm.report import build_report, run_report, validate, write_report
from jaxrl_llm.report.charts_sae import density, plot
from jaxrl_llm.report.sae_eval import TABLES, comparison_page, matched, sae_page
from jaxrl_llm.run_dir import RunDir

CONFIG = {"model": "m", "seed": 0}


def cell(value, half=0.01):
    return {"value": value, "low": value - half, "high": value + half}


def record(name, l0, kept=0.9, probes=True):
    figures = {key: cell(kept - 0.01 * i) for _, _, _, names in TABLES for i, key in enumerate(names)}
    figures |= {"l0": cell(l0, 0.0), "dead_share": {"value": 0.125}, "ce_recovered": cell(kept)}
    counts = np.random.default_rng(int(l0)).integers(0, 40, 48).tolist()
    out = {
        "name": name, "source": f"folder/{name}", "fingerprint": "x", "versions": {"jax": "1"}, "figures": figures,
        "sae": {"architecture": "topk", "d_in": 64, "d_sae": 512, "k": 8, "hook_name": "blocks.1.resid_post", "model_name": None},
        "data": {"source": "t.txt", "documents": 10, "tokens": 1000, "predictions": 990}, "seconds": {"activations": 1.0, "model": 2.0},
        "density": {"log10_edges": np.linspace(-6, 0, 49).tolist(), "counts": counts, "dead": 64, "latents": 512},
    }  # fmt: skip
    if probes:
        methods = [("sae_top_k", 1, 0.7), ("sae_top_k", 5, 0.8), ("llm_top_k", 1, 0.6), ("llm_top_k", 5, 0.7)]
        methods += [("diff_mean", None, 0.85), ("dense", None, 0.9), ("majority", None, 0.5)]
        rows = [{"method": m, "k": k, "accuracy": cell(v), "f1": cell(v), "auroc": cell(v), "classes": {"a": v}} for m, k, v in methods]
        out["probe"] = {"source": "p", "classes": ["a", "b", "c"], "train": 90, "test": 30, "methods": rows}
        out["tpp"] = {n: {"tpp": cell(0.1), "intended": cell(0.2), "unintended": cell(0.1)} for n in ("2", "10", "diff_mean")}
        names = ("mean_absorption_fraction_score", "mean_full_absorption_score", "mean_num_split_features", "mean_probe_f1")
        letters = [{"letter": "a", "main": [3], "probe_f1": 0.9, "sparse_f1": [0.8], "rows": 5, "fraction": 0.1, "full": 0.0, "absorbers": []}]
        letters.append({"letter": "z", "main": [4], "probe_f1": 0.0, "sparse_f1": [0.0], "rows": 0, "fraction": None, "full": None, "absorbers": []})
        out["absorption"] = {"figures": {name: {"value": 0.1} for name in names}, "letters": letters, "rows": 9, "tokens": 3}
    return out


RECORDS = [record("wide", 40, 0.95), record("small", 10, 0.8), record("other", 12, 0.85, probes=False)]


def test_like_l0_is_compared_and_the_best_of_them_said():
    assert [[r["name"] for r in group] for group in matched(sorted(RECORDS, key=lambda r: r["figures"]["l0"]["value"]))] == [
        ["small", "other"],
        ["wide"],
    ]
    page = validate(comparison_page(RECORDS, CONFIG, "runs"))
    assert page["headline"] == "other keeps most, 85.0% of the cross-entropy, at L0 12; wide keeps 95.0% of the cross-entropy, at L0 40."
    at = page["tables"][0]
    assert at["title"] == "At L0 10 to 12" and [row["name"] for row in at["rows"]] == ["small (L0 10)", "other (L0 12)"]
    whole = next(table for table in page["tables"] if table["title"] == "Reconstruction")
    assert [row["name"] for row in whole["rows"]] == ["small", "other", "wide"]
    assert [chart["title"] for chart in page["plots"]] == ["Explained variance", "Cross-entropy recovered (zero ablation)", "Probing accuracy"]
    assert [s["label"] for s in page["plots"][2]["series"]] == ["small", "wide", "k raw dimensions"]
    html = build_report(page)
    assert "At L0 10 to 12" in html and "folder/wide" in html and "Training metrics" not in html


def test_the_page_of_one():
    page = validate(sae_page(RECORDS[1], CONFIG))
    assert page["headline"] == "With 10 latents a token, 80.0% of the variance is explained and 80.0% of the cross-entropy is recovered; "\
        "12.5% of latents never fire."  # fmt: skip
    titles = [table["title"] for table in page["tables"]]
    assert titles[-4:] == ["Probes", "Targeted probe perturbation", "Feature absorption", "Absorption by letter"]
    probes = page["tables"][-4]
    assert [row["name"] for row in probes["rows"]][:4] == ["1 SAE latent", "5 SAE latents", "1 raw dimension", "5 raw dimensions"]
    assert probes["rows"][-1]["name"] == "majority" and probes["rows"][-1]["cells"][1:] == [None, None]
    assert page["tables"][-3]["columns"] == ["n = 2", "n = 10", "DiffMean"]
    l0 = next(fact for fact in page["facts"] if fact["label"] == "L0")
    assert l0 == {"label": "L0", "value": "10", "detail": ""}  # a TopK's L0 does not vary
    bare = validate(sae_page(RECORDS[2], CONFIG))
    assert "plots" not in bare and "Probes" not in [table["title"] for table in bare["tables"]]
    build_report(bare)
    alone = validate(comparison_page([RECORDS[2]], CONFIG, "runs"))
    assert "plots" not in alone and alone["facts"] and alone["headline"].startswith("With 12 latents")


def test_charts_draw_every_point_and_bar_with_its_reading():
    chart = comparison_page(RECORDS, CONFIG, "t")["plots"][2]
    html = plot(chart)
    assert html.count('class="plot-dot"') == 6 and html.count('class="level-line"') == 3 and html.count('class="whisker"') == 6
    assert "small\n70.0% at 1\n95% 69.0 to 71.0%" in html and "DiffMean" in html
    single = plot(comparison_page(RECORDS, CONFIG, "t")["plots"][0])
    assert single.count('class="plot-dot"') == 3 and single.count("point-label") == 3
    gap = plot({"title": "t", "x_label": "k", "series": [{"label": "a", "points": [{"x": 1, "value": None}, {"x": 2, "value": 0.5}]}]})
    assert gap.count('class="plot-dot"') == 1
    bars = density({"label": "d", "log10_edges": [-2, -1, 0], "counts": [3, 0], "dead": 1, "latents": 4})
    assert bars.count('class="bar-kept"') == 1 and "dead <b>1</b> of 4 (25.0%)" in bars and "3 latents" in bars
    assert 'class="bar-kept"' not in density({"label": "d", "log10_edges": [-2, -1, 0], "counts": [0, 0], "dead": 4, "latents": 4})


def test_marks_can_be_left_out():
    table = {"title": "t", "metric": "m", "columns": ["c"], "rows": [{"name": "r", "cells": [cell(0.5)]}]}
    base = {"title": "t", "headline": "h", "kind": "eval"}
    assert 'class="mark"' in build_report(base | {"tables": [table]})
    assert 'class="mark"' not in build_report(base | {"tables": [table | {"marks": False}]})


def test_mistakes_name_the_place(tmp_path):
    page = copy.deepcopy(comparison_page(RECORDS, CONFIG, "runs"))
    page["densities"][1]["counts"].pop()
    with pytest.raises(UserError, match=r"densities\[1\].counts has 47 entries, but the gaps of log10_edges has 48"):
        validate(page)
    RunDir(tmp_path, CONFIG, kind="eval_sae")
    with pytest.raises(UserError, match="did not finish"):
        run_report(tmp_path)
    (tmp_path / "eval.json").write_text(json.dumps({"saes": [RECORDS[2]]}))
    assert run_report(tmp_path)["title"] == f"SAE evaluation: {tmp_path.name}"


def test_a_browser_shows_both_pages_whole(tmp_path):
    write_report(tmp_path / "a.html", comparison_page(RECORDS[:2] + [record("a very long name of a dictionary", 11)], CONFIG, "runs"))
    assert_whole(tmp_path / "a.html", tmp_path / "profile", {"plot", "density"}, "At L0 10 to 11")
    write_report(tmp_path / "b.html", sae_page(RECORDS[1], CONFIG))
    assert_whole(tmp_path / "b.html", tmp_path / "profile2", {"plot", "density"}, "Absorption by letter")
