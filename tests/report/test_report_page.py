import base64
import copy
import hashlib
import json
import os
import re
from html.parser import HTMLParser

import pytest
from fake_saerl import ARMS, EVIL, saerl_data

from jaxrl_llm.errors import UserError
from jaxrl_llm.report import build_report, validate, write_report


class Page(HTMLParser):
    """Tags with attributes, the text of every script, and the visible text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.words, self._open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "script":
            self.scripts.append([dict(attrs), ""])

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts[-1][1] += data
        elif self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def full():
    return build_report(saerl_data(prompts=300))


@pytest.fixture(scope="module")
def page(full):
    return Page(full)


def section(page_html, key):
    start = page_html.index(f'<section id="{key}">')
    return page_html[start : page_html.index("</section>", start)]


def row_of(table_html, name):
    """The table row whose head holds `name`."""
    return next(row for row in re.findall(r"<tr.*?</tr>", table_html) if f">{name}<" in row)


SECTIONS = ["curves", "arms_tables", "prompt_map", "schedules", "calibration", "quality", "signals"]
SECTIONS += ["features", "rollouts", "config", "provenance"]


def test_every_section_is_there_once_and_in_the_bar(full, page):
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert ids == SECTIONS
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == [f"#{key}" for key in SECTIONS]
    assert "Not on this page" not in page.text


def test_text_of_the_run_is_never_markup(full, page):
    assert EVIL not in full
    assert "<img" not in full and 'onerror="' not in full
    assert page.text.count(EVIL) >= 2  # a prompt and a response, as text
    assert not [tag for tag, attrs in page.tags if any(key.startswith("on") for key in attrs)]
    assert len([1 for attrs, _ in page.scripts if attrs.get("type") != "application/json"]) == 1


def test_islands_are_json_and_hold_the_evil_prompt_whole(page):
    islands = [json.loads(body) for attrs, body in page.scripts if attrs.get("type") == "application/json"]
    maps = [data for data in islands if "prompts" in data]
    assert maps[0]["prompts"][3] == EVIL
    assert len(islands) == 1 + 1 + len(ARMS)  # curves, map, schedules


def test_every_free_text_is_escaped():
    """Puts a tag into every string of the data, wherever it is, and looks for it in the page."""
    bad = "<b id=x>&\"'"

    def poison(value, key=None):
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v, key) for v in value]
        free = isinstance(value, str) and key not in ("name", "arm", "kind", "role")
        return bad + value if free else value

    html = build_report(poison(validate(saerl_data(prompts=30))))
    assert "<b id=x>" not in html
    assert html.count("&lt;b id=x&gt;") > 100


def test_nothing_is_loaded_and_only_our_script_may_run(full, page):
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    script = next(body for attrs, body in page.scripts if not attrs)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert not [attrs for _, attrs in page.tags if "src" in attrs or attrs.get("href", "#")[0] != "#"]
    shell = full.replace("http://evil.example/x", "")
    assert "://" not in shell and "@import" not in shell and "url(" not in shell


def test_absent_sections_are_named_with_their_reasons():
    html = build_report({"title": "t", "headline": "h", "left_out": {"features": "no SAE was trained"}, "curves": [], "arms_tables": []})
    text = Page(html).text
    assert '<section id="curves">' not in html and "<svg" not in html
    assert "The most telling SAE features: no SAE was trained." in text
    assert "Accuracy over training: this run has no data for it." in text
    assert "Training metrics" not in text  # belongs to single runs only


def test_a_section_without_a_single_value_is_left_out():
    series = {"arm": "a", "steps": [0, 1], "mean": [None, None]}
    panel = {"title": "p", "series": [{"label": "x", "steps": [], "values": []}]}
    html = build_report({"kind": "run", "title": "t", "headline": "h", "curves": [{"title": "c", "series": [series]}], "panels": [panel]})
    assert "<figure" not in html
    assert "Training metrics: this run has no data for it." in Page(html).text


def test_best_cells_are_bold_ties_too_and_bounds_never():
    def cells(*values):
        return [None if v is None else {"value": v} for v in values]

    table = {
        "title": "T",
        "metric": "m",
        "columns": ["a", "b", "c"],
        "rows": [
            {"name": "ours", "cells": cells(0.5, 0.71, None), "kind": "ours"},
            {"name": "plain", "cells": cells(0.6, 0.7101, None)},
            {"name": "oracle", "cells": cells(0.9, 0.9, 0.9), "kind": "bound"},
        ],
    }
    html = build_report({"title": "t", "headline": "h", "signals": [table]})
    bold = lambda name: re.findall(r"<b class=\"value\">([\d.]+)</b>", row_of(html, name))  # noqa: E731
    assert (bold("ours"), bold("plain"), bold("oracle")) == (["0.710"], ["0.600", "0.710"], [])
    html = build_report({"title": "t", "headline": "h", "signals": [table | {"higher_is_better": False}]})
    assert bold("ours") == ["0.500", "0.710"]
    assert "<b class=" not in build_report({"title": "t", "headline": "h", "signals": [table | {"higher_is_better": None}]})


def test_columns_of_several_kinds_have_a_scale_each():
    rows = [{"name": "one", "cells": [{"value": 0.1}, {"value": 10.0}]}, {"name": "two", "cells": [{"value": 0.2}, {"value": 20.0}]}]
    table = {"title": "T", "metric": "m", "columns": ["a", "b"], "rows": rows}

    def places(**more):
        html = build_report({"title": "t", "headline": "h", "tables": [table | more]})
        return [[float(x) for x in re.findall(r"<circle[^>]*cx=\"([\d.]+)", row_of(html, name))] for name in ("one", "two")]

    one, two = places(higher_is_better=None)
    assert one[0] == one[1] < two[0] == two[1]
    one, two = places()
    assert one[0] < one[1] < two[1] and two[0] - one[0] < 0.02 * (two[1] - one[1])


def test_the_arms_table_says_points_steps_and_what_was_not_reached(full):
    table = section(full, "arms_tables")
    row = row_of(table, "SAERL, full")
    assert "45.8%" in row and "+3.4" in row and "+2.3 to +4.5" in row and "saved 27%<" in row and ">21 to 33%<" in row
    lost = row_of(table, "published order")
    assert "−1.6" in lost and "not reached" in lost and "var(--loss)" in lost
    assert "fill:var(--page)" in row_of(table, "filter only")  # hollow: the interval holds zero
    assert "fill:var(--page)" not in row
    assert "against vanilla, points" in table and "steps to vanilla’s final value" in table


def test_columns_without_data_are_left_out():
    rows = [{"arm": "a", "accuracy": {"value": 0.5}}, {"arm": "b", "accuracy": {"value": 0.6}, "steps_to_target": None}]
    html = build_report({"title": "t", "headline": "h", "arms_tables": [{"title": "T", "rows": rows}]})
    heads = [words for words in re.findall(r"<th[^>]*>([^<]*)</th>", html) if words]
    assert heads == ["arm", "final accuracy", "steps to the baseline’s final value"]
    assert row_of(html, "a").count("–") == 1 and "not reached" in row_of(html, "b")


def test_what_the_main_arm_is_worth_over_each_control_is_shown_where_there_are_controls():
    gap = {"value": 0.016, "low": 0.005, "high": 0.027}
    rows = [{"arm": name, "accuracy": {"value": 0.5}, "seeds": 24, "main_minus": gap} for name in ("a", "b", "c")]
    arms = [{"name": name, "label": name, "role": role} for name, role in (("a", "baseline"), ("b", "main"), ("c", "control"))]

    def table_of(rows, **more):
        data = {"title": "t", "headline": "h", "arms": arms, "arms_tables": [{"title": "T", "rows": rows} | more]}
        return section(build_report(data), "arms_tables")

    table = table_of(rows)
    assert "b minus it, points" in table and "+1.6" in row_of(table, "c") and "+0.5 to +2.7" in row_of(table, "c")
    assert "minus it" not in table_of(rows[:2])  # the difference to the baseline says it already
    assert ">seeds<" in table and ">seeds<" not in table_of(rows, note="24 paired cells")
    assert ">seeds<" in table_of([rows[0] | {"seeds": 5}, *rows[1:]], note="some paired cells")


def test_the_mark_of_saved_steps_follows_the_target(full):
    assert "vanilla’s final value, 42.4%" in full
    data = saerl_data(prompts=20)
    data["curves"][0]["target"]["steps"]["full"] = 72
    assert "48 fewer steps (40%)" in build_report(data)
    data["curves"][0]["target"]["steps"]["full"] = None
    assert "fewer steps" not in section(build_report(data), "curves")


def test_quality_counts_what_the_cut_drops():
    scores = {"clean": [0.1, 0.5, 0.6, 0.7, float("nan")], "wrong answer": [0.1, 0.2, 0.9]}
    data = {"title": "t", "headline": "h", "quality": {"scores": scores, "cut": 0.4}}
    text = Page(build_report(data)).text
    assert "clean 4 prompts 25% dropped (1)" in text and "wrong answer 3 prompts 67% dropped (2)" in text
    moved = Page(build_report(data | {"quality": {"scores": scores, "cut": 0.15}})).text
    assert "wrong answer 3 prompts 33% dropped (1)" in moved


def test_verdicts_gold_answers_and_filters_of_rollouts(full):
    rollouts = section(full, "rollouts")
    assert "✓ pass" in rollouts and "✗ fail" in rollouts and "… timeout" in rollouts and "the checker took over 2 s" in rollouts
    assert rollouts.count('data-changed="1"') > 0 and "verdict changed by training" in rollouts
    assert re.findall(r'data-filter="arms" data-value="(\w+)"', rollouts) == ["base", "vanilla", "full", "published"]


def test_five_thousand_prompts_stay_small_and_more_are_thinned():
    big = build_report(saerl_data(prompts=5000))
    assert len(big.encode()) < 3_000_000
    data = saerl_data(prompts=100)
    for key in ("x", "y", "prompts"):
        data["prompt_map"][key] = list(data["prompt_map"][key]) * 110
    for field in data["prompt_map"]["fields"]:
        field["values"] = list(field["values"]) * 110
    html = build_report(data)
    assert "3,667 of 11,000 prompts" in html
    assert len(json.loads(re.search(r'<script type="application/json">(\{"x":\[[\d,]+\],"y".*?)</script>', html)[1])["x"]) == 3667


def test_categories_are_in_natural_order_and_unknown_stays_none():
    data = saerl_data(prompts=4)
    data["prompt_map"]["fields"] = [
        {"name": "cluster", "kind": "category", "values": [10, 2, None, 2.0]},
        {"name": "kept", "kind": "category", "values": [True, False, True, True], "order": ["yes"]},
    ]
    body = next(b for a, b in Page(build_report(data)).scripts if '"prompts"' in b)
    cluster, kept = json.loads(body)["fields"]
    assert cluster["categories"] == ["2", "10"] and cluster["values"] == [1, 0, None, 0]
    assert kept["categories"] == ["yes", "no"] and kept["values"] == [0, 1, 0, 0]


def test_a_page_is_deterministic_and_the_data_stays_untouched():
    data = saerl_data(prompts=40)
    before = copy.deepcopy(validate(data))
    assert build_report(data) == build_report(data)
    assert validate(data) == before


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    write_report(target, {"title": "old", "headline": "h"})

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(UserError, match="disk is full"):
        write_report(target, {"title": "new", "headline": "h"})
    assert "old" in target.read_text() and list(tmp_path.iterdir()) == [target]


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1])
def test_every_colour_of_text_has_the_contrast_that_wcag_asks(full, theme):
    pairs = {name: pair for name, *pair in re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", full)}
    page_light = luminance(pairs["page"][theme])
    for name in ["ink", "soft", "muted", "main", "baseline", "pass", "fail", *(f"c{i}" for i in range(6))]:
        low, high = sorted([luminance(pairs[name][theme]), page_light])
        assert (high + 0.05) / (low + 0.05) >= 4.5, name
