"""The sections of the page that show results: headline, curves, arms, map, schedule, calibration, quality, signals.

Each function takes validated data and returns the section's inner HTML. `page.py` puts them in order with titles and ledes.
"""

from __future__ import annotations

from jaxrl_llm.report.arms import Arms
from jaxrl_llm.report.charts_data import (
    calibration_charts,
    interval_mark,
    mark_limits,
    quality_chart,
    schedule_charts,
)
from jaxrl_llm.report.charts_lines import curve_chart, island, panel_chart, significant
from jaxrl_llm.report.svg import clip, esc, interval, number, tag

MAX_MAP_POINTS = 5000
MAX_PROMPT = 280  # characters of a prompt in the map's hover text


def note(content: str | None) -> str:
    """A remark under a chart or table; nothing where there is none."""
    return tag("p", esc(content), cls="note") if content else ""


def scrolling(table: str, label: str) -> str:
    """A table in a box of its own that scrolls sideways (and by keyboard) where the page is narrow."""
    return tag("div", table, cls="scroll", tabindex="0", role="region", aria_label=label)


# ---- headline ----


def headline(data: dict) -> str:
    """The page's title, its one sentence and the large figures."""
    eyebrow = tag("p", esc(data["subtitle"]), cls="eyebrow") if data.get("subtitle") else ""
    facts = "".join(
        tag(
            "div",
            tag("dt", esc(fact["label"]))
            + tag("dd", tag("b", esc(fact["value"])) + (tag("small", esc(fact["detail"])) if fact.get("detail") else "")),
        )
        for fact in data.get("facts", [])
    )
    facts = tag("dl", facts, cls="facts") if facts else ""
    return eyebrow + tag("h1", esc(data["title"])) + tag("p", esc(data["headline"]), cls="headline") + facts


# ---- curves, panels ----


def curves(charts: list[dict], arms: Arms) -> str:
    """The charts that have a point to show."""
    shown = [chart for chart in charts if any(v is not None for series in chart["series"] for v in series["mean"])]
    drawn = "".join(curve_chart(chart, arms) for chart in shown)
    return drawn if arms.listed or len(shown) < 2 else tag("div", drawn, cls="pair")


def panels(items: list[dict], remark: str | None = None) -> str:
    """The panels that have a point to show."""
    shown = [panel for panel in items if any(v is not None for series in panel["series"] for v in series["values"])]
    return tag("div", "".join(panel_chart(panel) for panel in shown), cls="grid") + note(remark) if shown else ""


# ---- arms ----


def arms_tables(tables: list[dict], arms: Arms) -> str:
    """The arms beside the baseline, a table a pool."""
    return "".join(_arms_table(table, arms) for table in tables)


def _arms_table(table: dict, arms: Arms) -> str:
    percent, rows = table.get("percent", True), table["rows"]
    levels = list(dict.fromkeys(level for row in rows for level in row.get("per_level") or {}))
    show = {key: any(row.get(key) is not None for row in rows) for key in ("difference", "steps_saved", "mixed_groups", "seeds")}
    show["steps_to_target"] = any("steps_to_target" in row for row in rows)
    # Where every arm has as many, the note under the table says how many.
    show["seeds"] = len({row.get("seeds") for row in rows}) > 1 or (show["seeds"] and not table.get("note"))
    show["main_minus"] = len(rows) > 2 and any(row.get("main_minus") for row in rows)
    show["rollouts"] = any(row.get("rollouts", 1) > 1 for row in rows)
    limits = mark_limits([row.get("difference") for row in rows], zero=True)
    strongest = max((abs(v) for row in rows for v in (row.get("per_level") or {}).values() if v is not None), default=0.0)
    unit = "points" if percent else "difference"
    baseline = arms.baseline
    head = [_th("arm"), _th("final accuracy" if percent else "final score", numeric=True)]
    if show["difference"]:
        head += [_th(f"against {baseline}, {unit}", numeric=True), '<th class="mark-cell"><span class="hidden">interval</span></th>']
    if show["main_minus"]:
        head.append(_th(f"{arms.main} minus it, {unit}", numeric=True))
    if show["steps_to_target"]:
        head.append(_th(f"steps to {baseline}’s final value", numeric=True))
    head += [_th(f"{table.get('level_name', 'level')} {level}", numeric=True, title=f"difference to {baseline}") for level in levels]
    if show["mixed_groups"]:
        head.append(_th("mixed groups", numeric=True, title="share of groups whose samples got different rewards"))
    if show["rollouts"]:
        head.append(_th("rollouts a step", numeric=True, title="batches sampled until one was full of mixed groups"))
    if show["seeds"]:
        head.append(_th("seeds", numeric=True))
    body = "".join(_arms_row(row, arms, percent, levels, show, limits, strongest) for row in rows)
    html = tag("table", tag("thead", tag("tr", "".join(head))) + tag("tbody", body), cls="arms")
    title = tag("h3", esc(table["title"]))
    return tag("div", title + scrolling(html, table["title"]) + note(table.get("note")), cls="table-block")


def _th(content: str, *, numeric: bool = False, title: str | None = None) -> str:
    return tag("th", esc(content), scope="col", cls="num" if numeric else None, title=title)


def _arms_row(row: dict, arms: Arms, percent: bool, levels: list[str], show: dict, limits: tuple[float, float], strongest: float) -> str:
    name = row["arm"]
    about = tag("small", esc(arms.about(name))) if arms.about(name) else ""
    label = tag("div", arms.swatch(name) + tag("span", esc(arms.label(name)) + about), cls="arm-name")
    cells = [tag("th", label, scope="row")]
    cells.append(_estimate_cell(row["accuracy"], percent=percent))
    if show["difference"]:
        difference = row.get("difference")
        if difference:
            cells.append(_estimate_cell(difference, percent=percent, signed=True))
            width = 70 if show["main_minus"] else 120  # the table must fit beside one column more
            cells.append(tag("td", interval_mark(difference, limits, colour=arms.colour(name), zero=True, width=width), cls="mark-cell"))
        else:
            cells.append('<td class="num quiet">–</td><td class="mark-cell"></td>')
    if show["main_minus"]:
        gap = row.get("main_minus")
        cells.append(_estimate_cell(gap, percent=percent, signed=True) if gap else '<td class="num quiet">–</td>')
    if show["steps_to_target"]:
        cells.append(_steps_cell(row))
    cells += [_level_cell((row.get("per_level") or {}).get(level), percent, strongest) for level in levels]
    if show["mixed_groups"]:
        cells.append(tag("td", number(row.get("mixed_groups"), percent=True, digits=0), cls="num"))
    if show["rollouts"]:
        cells.append(tag("td", number(row.get("rollouts"), digits=2), cls="num"))
    if show["seeds"]:
        cells.append(tag("td", number(row.get("seeds")), cls="num"))
    return tag("tr", "".join(cells), cls=f"role-{arms.role(name)}")


def _estimate_cell(estimate: dict, *, percent: bool = False, signed: bool = False, strong: bool = False, extra: str = "") -> str:
    """The figure, its interval in small under it, and what `extra` adds."""
    count = isinstance(estimate["value"], int)
    digits = None if percent or count else 3 if abs(estimate["value"]) < 10 else None
    value = number(estimate["value"], percent=percent, signed=signed, digits=digits)
    span = interval(estimate.get("low"), estimate.get("high"), percent=percent, signed=signed, digits=digits)
    body = tag("b" if strong else "span", value, cls="value") + (tag("small", span) if span else "")
    return tag("td", extra + body, cls="num")


def _steps_cell(row: dict) -> str:
    if "steps_to_target" not in row:
        return '<td class="num quiet">–</td>'
    steps, saved, detail = row["steps_to_target"], row.get("steps_saved"), ""
    if saved:
        span = interval(saved.get("low"), saved.get("high"), percent=True, digits=0)
        detail = tag("small", f"saved {number(saved['value'], percent=True, digits=0)}") + (tag("small", span) if span else "")
    value = tag("span", "not reached" if steps is None else number(steps), cls="value")
    return tag("td", value + detail, cls="num quiet" if steps is None else "num")


def _level_cell(value: float | None, percent: bool, strongest: float) -> str:
    """A difference on a tint: blue for gains, orange for losses, as strong as the table's largest."""
    if value is None:
        return '<td class="num quiet">–</td>'
    share = 0.0 if strongest == 0 else abs(value) / strongest
    colour = "var(--gain)" if value >= 0 else "var(--loss)"
    style = f"background:color-mix(in srgb,{colour} {round(38 * share)}%,transparent)"
    return tag("td", number(value, percent=percent, signed=True), cls="num level", style=style)


# ---- map ----


def prompt_map(data: dict) -> str:
    """The canvas, its controls and its data: positions as whole numbers from 0 to 10,000, categories as indices."""
    total = len(data["x"])
    every = max(1, -(-total // MAX_MAP_POINTS))
    keep = range(0, total, every)
    payload = {
        "x": _grid([data["x"][i] for i in keep]),
        "y": _grid([data["y"][i] for i in keep]),
        "prompts": [clip(data["prompts"][i], MAX_PROMPT) for i in keep],
        "fields": [_map_field(field, keep) for field in data["fields"]],
    }
    buttons = "".join(
        tag("button", esc(field.get("label", field["name"])), type="button", data_field=i, aria_pressed="true" if i == 0 else "false")
        for i, field in enumerate(data["fields"])
    )
    controls = tag("div", tag("span", "colour by", cls="control-name") + buttons, cls="controls", role="group", aria_label="Colour by")
    spoken = "Map of the prompts. Arrow keys move from point to point."
    canvas = tag("div", tag("canvas", "", tabindex="0", role="img", aria_label=spoken), cls="canvas-box")
    legend = tag("div", "", cls="map-legend", aria_live="polite")
    shown = f"{number(len(keep))} of {number(total)} prompts" if every > 1 else f"{number(total)} prompts"
    about = f"{shown}; {data['method']}." if data.get("method") else f"{shown}."
    body = controls + tag("div", canvas + legend, cls="map-body") + note(about) + note(data.get("note"))
    body += "<noscript><p class='note'>The map needs JavaScript.</p></noscript>"
    return tag("figure", body + island(payload), cls="map", data_chart="map")


def _grid(values: list[float]) -> list[int]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return [round(10000 * (v - low) / ((high - low) or 1.0)) for v in values]


def _natural(text: str) -> tuple[int, float, str]:
    """Sorts "2" before "10" and numbers before words."""
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)


def _map_field(field: dict, keep: range) -> dict:
    out = {"name": field["name"], "label": field.get("label", field["name"]), "kind": field["kind"]}
    values = [field["values"][i] for i in keep]
    if field["kind"] == "number":
        numbers = [float(v) if isinstance(v, (int, float)) else None for v in values]
        return out | {"values": [significant(v, 3) for v in numbers], "percent": field.get("percent", False)}
    words = [None if v is None else {True: "yes", False: "no"}[v] if isinstance(v, bool) else _word(v) for v in values]
    found = sorted({w for w in words if w is not None}, key=_natural)
    order = [c for c in field.get("order", []) if c in found]
    order += [c for c in found if c not in order]
    index = {category: i for i, category in enumerate(order)}
    return out | {"categories": order, "values": [None if w is None else index[w] for w in words]}


def _word(value: str | float) -> str:
    return str(int(value)) if isinstance(value, float) and value == int(value) else str(value)


# ---- schedule, calibration, quality ----


def schedules(items: list[dict], arms: Arms) -> str:
    """The baseline and the main arm first; the arms after the third are folded away."""
    rank = {"baseline": 0, "main": 1}
    charts = schedule_charts(sorted(items, key=lambda item: rank.get(arms.role(item["arm"]), 2)), arms)
    body = tag("div", "".join(charts[:3]), cls="grid")
    if len(charts) > 3:
        rest = tag("div", "".join(charts[3:]), cls="grid")
        body += tag("details", tag("summary", f"{len(charts) - 3} more arms") + rest)
    return body


def calibration(data: dict) -> str:
    """Predicted against observed difficulty."""
    return tag("div", "".join(calibration_charts(data)), cls="grid") + note(data.get("note"))


def quality(data: dict) -> str:
    """The histogram of quality scores with the cut."""
    return quality_chart(data) + note(data.get("note"))


# ---- signals against truth ----


def signals(tables: list[dict]) -> str:
    """Figures beside what they are compared with, a table a property."""
    return "".join(_signal_table(table) for table in tables)


def _signal_table(table: dict) -> str:
    columns = [[row["cells"][column] for row in table["rows"]] for column in range(len(table["columns"]))]
    # One scale for all columns, unless they are no measures of one kind: then each has its own.
    one_kind = table.get("higher_is_better", True) is not None
    together = mark_limits([cell for cells in columns for cell in cells])
    limits = [together if one_kind else mark_limits(cells) for cells in columns]
    best = [_best(table, column) for column in range(len(table["columns"]))]
    head = tag("tr", _th("from") + "".join(_th(column, numeric=True) for column in table["columns"]))
    body = "".join(_signal_row(row, best, limits, table.get("marks", True), table.get("percent", False)) for row in table["rows"])
    html = tag("table", tag("thead", head) + tag("tbody", body), cls="signals")
    title = tag("h3", esc(table["title"]) + tag("small", esc(table["metric"])))
    return tag("div", title + scrolling(html, f"{table['title']}: {table['metric']}") + note(table.get("note")), cls="table-block")


def _best(table: dict, column: int) -> float | None:
    """The best value of a column as shown, bounds apart; ties are all bold. None where no value is better than another."""
    higher = table.get("higher_is_better", True)
    values = [row["cells"][column]["value"] for row in table["rows"] if row.get("kind") != "bound" and row["cells"][column]]
    if not values or higher is None:
        return None
    return round(max(values) if higher else min(values), 3)


def _signal_row(row: dict, best: list[float | None], limits: list[tuple[float, float]], marks: bool, percent: bool) -> str:
    kind = row.get("kind", "baseline")
    colour = {"ours": "var(--main)", "bound": "var(--muted)"}.get(kind, "var(--baseline)")
    cells = [tag("th", esc(row["name"]), scope="row")]
    for cell, top, ends in zip(row["cells"], best, limits, strict=True):
        if cell is None:
            cells.append('<td class="num quiet">–</td>')
            continue
        strong = kind != "bound" and top is not None and round(cell["value"], 3) == top
        mark = interval_mark(cell, ends, colour=colour, width=96) if marks else ""
        cells.append(_estimate_cell(cell, percent=percent, strong=strong, extra=mark))
    return tag("tr", "".join(cells), cls=f"kind-{kind}")
