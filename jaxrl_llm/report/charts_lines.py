"""Line charts: accuracy curves of the arms with bands and the steps-to-target mark, and small panels of training metrics."""

from __future__ import annotations

import json
from collections.abc import Sequence

from jaxrl_llm.report.arms import Arms
from jaxrl_llm.report.svg import (
    CHARACTER_WIDTH,
    FULL_WIDTHS,
    Scale,
    band_path,
    clip,
    domain,
    esc,
    line,
    line_path,
    number,
    responsive,
    spread,
    svg,
    tag,
    text,
    x_axis,
    y_grid,
)

MAX_POINTS = 300  # of a line: longer series are averaged into this many bins
SMOOTH_FROM = 40  # points from which a panel shows a running mean over the raw line


def island(data: object) -> str:
    """Data for page.js inside its figure, as JSON that cannot close the script element."""
    body = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        body = body.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json">{body}</script>'


def significant(value: float | None, digits: int = 5) -> float | None:
    """The value in few digits: what a hover shows needs no more, and the page stays small."""
    return None if value is None else float(f"{value:.{digits}g}")


def hover_attributes(x: Scale, y: Scale) -> dict[str, str]:
    """What page.js needs to place the cross-hair: both scales of a drawing."""
    scales = [x.d0, x.d1, x.r0, x.r1, y.d0, y.d1, y.r0, y.r1, int(y.log)]
    return {"data_hover": " ".join(f"{value:.6g}" for value in scales), "tabindex": "0"}


# ---- accuracy curves ----


def curve_chart(chart: dict, arms: Arms) -> str:
    """One chart of `schema.CurveChart` at every width, with its legend and hover data."""
    percent = chart.get("percent", True)
    names = arms.drawing_order([series["arm"] for series in chart["series"]])
    by_name = {series["arm"]: series for series in chart["series"]}
    drawn = responsive(lambda width: _draw_curves(chart, by_name, names, arms, width), FULL_WIDTHS)
    steps = sorted({step for series in chart["series"] for step in series["steps"]})
    hover = {
        "x": steps,
        "xName": chart.get("x_label", "GRPO step"),
        "percent": percent,
        "series": [_hover_series(by_name[name], steps, arms.label(name), arms.colour(name)) for name in reversed(names)],
    }
    caption = tag("figcaption", esc(chart["title"]), cls="chart-title")
    band = tag("p", f"Bands: {esc(chart['band'])}.", cls="note") if chart.get("band") else ""
    note = tag("p", esc(chart["note"]), cls="note") if chart.get("note") else ""
    legend = tag("div", arms.legend(arms.reading_order([series["arm"] for series in chart["series"]])), cls="legend-narrow")
    return tag("figure", caption + legend + drawn + band + note + island(hover), cls="chart", data_chart="curves")


def _hover_series(series: dict, steps: list[float], label: str, colour: str) -> dict:
    def at(key: str) -> list[float | None]:
        found = dict(zip(series["steps"], series[key], strict=True))
        return [significant(found.get(step)) for step in steps]

    out = {"label": label, "colour": colour, "values": at("mean")}
    if "low" in series and "high" in series:
        out |= {"low": at("low"), "high": at("high")}
    return out


def _draw_curves(chart: dict, by_name: dict[str, dict], names: list[str], arms: Arms, width: int) -> str:
    narrow = width < 460
    height = {1040: 430, 780: 390, 540: 340}.get(width, 280)
    percent = chart.get("percent", True)
    room = {1040: 26, 780: 22}.get(width, 14)  # characters of a label
    longest = max((len(clip(arms.label(name), room)) for name in names), default=0)
    right = 14 if narrow else 26 + 13 * CHARACTER_WIDTH * (longest + 7)
    steps = [step for series in by_name.values() for step in series["steps"]]
    target = chart.get("target")
    values = [v for series in by_name.values() for key in ("mean", "low", "high") for v in series.get(key, [])]
    low, high = domain([*values, target["value"] if target else None])
    x = Scale(min(steps, default=0), max(steps, default=1), 46, width - right)
    y = Scale(low, high, height - 44, 14)
    parts = [y_grid(y, x.r0, x.r1, percent=percent), x_axis(x, y.r0, chart.get("x_label", "GRPO step"), count=4 if narrow else 7)]
    for name in names:
        parts.append(_curve_band(by_name[name], arms, name, x, y))
    parts += [_curve_line(by_name[name], arms, name, x, y) for name in names]
    if not narrow:
        parts.append(_end_labels(by_name, names, arms, x, y, percent, room))
    if target:
        parts.append(_target_mark(target, by_name, names, arms, x, y, percent))
    label = f"{chart['title']}: {chart.get('y_label', 'accuracy')} by step for {', '.join(arms.label(n) for n in names)}"
    return svg(width, height, "".join(parts), label, "lines", **hover_attributes(x, y))


def _curve_band(series: dict, arms: Arms, name: str, x: Scale, y: Scale) -> str:
    if "low" not in series or "high" not in series or not arms.is_strong(name):
        return ""
    points = [
        (x(step), None if lo is None else y(lo), None if hi is None else y(hi))
        for step, lo, hi in zip(series["steps"], series["low"], series["high"], strict=True)
    ]
    return tag("path", d=band_path(points), cls="band", style=f"fill:{arms.colour(name)}", data_arm=name)


def _curve_line(series: dict, arms: Arms, name: str, x: Scale, y: Scale) -> str:
    points = [(x(s), None if v is None else y(v)) for s, v in zip(series["steps"], series["mean"], strict=True)]
    weight = "line strong" if arms.is_strong(name) else "line"
    colour = f"stroke:{arms.colour(name)}"
    return tag("path", d=line_path(points), cls=weight, style=colour, stroke_dasharray=arms.dash(name), data_arm=name)


def _last(series: dict) -> tuple[float, float] | None:
    """The last step that has a value, and the value."""
    pairs = [(s, v) for s, v in zip(series["steps"], series["mean"], strict=True) if v is not None]
    return pairs[-1] if pairs else None


def _end_labels(by_name: dict[str, dict], names: list[str], arms: Arms, x: Scale, y: Scale, percent: bool, room: int) -> str:
    """Every arm's name and final value at the end of its line, spread so that none overlap."""
    ends = [(name, end) for name in names if (end := _last(by_name[name]))]
    places = spread([y(end[1]) for _, end in ends], 17, y.r1 + 4, y.r0 - 4)
    out = []
    for (name, (step, value)), place in zip(ends, places, strict=True):
        colour = f"fill:{arms.colour(name)}"
        px, py = x(step), y(value)
        out.append(f'<path class="leader" d="M{px + 3:.1f} {py:.1f}L{x.r1 + 14:.1f} {place:.1f}"/>')
        weight = "end strong" if arms.is_strong(name) else "end"
        value_part = tag("tspan", esc(number(value, percent=percent)), cls="end-value", dx="6")
        name_part = esc(clip(arms.label(name), room))
        out.append(tag("text", name_part + value_part, x=x.r1 + 18.0, y=place + 4.5, cls=weight, style=colour, data_arm=name))
    return "".join(out)


def _target_mark(target: dict, by_name: dict[str, dict], names: list[str], arms: Arms, x: Scale, y: Scale, percent: bool) -> str:
    """The dashed line at the baseline's final value, a dot where each arm first reaches it, and the steps that the main arm saves."""
    level = y(target["value"])
    out = [line(x.r0, level, x.r1, level, "target")]
    wanted = f"{arms.label(target['arm'])}’s final value, {number(target['value'], percent=percent)}"
    out.append(text(x.r0 + 6, level - 7, wanted, "target-label"))
    for name in names:
        step = target["steps"].get(name)
        if step is not None and name != target["arm"]:
            tip = f"{arms.label(name)} reaches it at step {number(step)}"
            out.append(tag("circle", cx=x(step), cy=level, r=4.5, cls="reach", style=f"fill:{arms.colour(name)}", data_tip=tip))
    main = arms.main
    end = _last(by_name[target["arm"]]) if target["arm"] in by_name else None
    step = target["steps"].get(main) if main else None
    if main is None or step is None or end is None or main == target["arm"] or step >= end[0]:
        return "".join(out)
    colour, floor = arms.colour(main), y.r0 - 9
    saved = f"{number(round(end[0] - step))} fewer steps ({number((end[0] - step) / end[0], percent=True, digits=0)})"
    out.append(line(x(step), level + 5, x(step), y.r0, "drop", style=f"stroke:{colour}"))
    bracket = f"M{x(step) + 1:.1f} {floor:.1f}H{x(end[0]):.1f}m0 -4v8"
    out.append(f'<path class="bracket" d="{bracket}" style="stroke:{colour}"/>')
    fits = x(end[0]) - x(step) > len(saved) * 12 * CHARACTER_WIDTH
    place, anchor = ((x(step) + x(end[0])) / 2, "middle") if fits else (x(end[0]), "end")
    out.append(text(place, floor - 7, saved, "bracket-label", anchor, style=f"fill:{colour}"))
    return "".join(out)


# ---- panels of training metrics ----

PANEL_WIDTH, PANEL_HEIGHT = 340, 168


def thin(steps: Sequence[float], values: Sequence[float | None], limit: int = MAX_POINTS) -> tuple[list[float], list[float | None]]:
    """A series of at most `limit` points: the mean step and mean value of equal runs of points."""
    if len(steps) <= limit:
        return list(steps), list(values)
    out_steps: list[float] = []
    out_values: list[float | None] = []
    for i in range(limit):
        start, stop = i * len(steps) // limit, (i + 1) * len(steps) // limit
        found = [v for v in values[start:stop] if v is not None]
        out_steps.append(round(sum(steps[start:stop]) / (stop - start), 1))
        out_values.append(sum(found) / len(found) if found else None)
    return out_steps, out_values


def running_mean(values: Sequence[float | None], radius: int) -> list[float | None]:
    """The mean of the values within `radius` places on each side; a gap stays a gap."""
    out: list[float | None] = []
    for i, value in enumerate(values):
        near = [v for v in values[max(0, i - radius) : i + radius + 1] if v is not None]
        out.append(None if value is None else sum(near) / len(near))
    return out


def panel_chart(panel: dict) -> str:
    """One small chart of `schema.Panel`: raw values thin, their running mean on top where there are many."""
    percent = panel.get("percent", False)
    log = panel.get("log", False) and all(v is None or v > 0 for series in panel["series"] for v in series["values"])
    prepared, hover_series = [], []
    for i, series in enumerate(panel["series"]):
        steps, values = thin(series["steps"], series["values"])
        prepared.append((steps, values, "var(--main)" if len(panel["series"]) == 1 else f"var(--c{i % 6})"))
    everything = [v for _, values, _ in prepared for v in values]
    low, high = domain(everything, log=log)
    all_steps = [s for steps, _, _ in prepared for s in steps]
    x = Scale(min(all_steps, default=0), max(all_steps, default=1), 44, PANEL_WIDTH - 10)
    y = Scale(low, high, PANEL_HEIGHT - 26, 10, log)
    parts = [y_grid(y, x.r0, x.r1, count=3, percent=percent), x_axis(x, y.r0, "", count=4)]
    grid_steps = sorted(set(all_steps))
    for (steps, values, colour), series in zip(prepared, panel["series"], strict=True):
        parts.append(_panel_line(steps, values, colour, x, y))
        found = dict(zip(steps, values, strict=True))
        hover_series.append({"label": series["label"], "colour": colour, "values": [significant(found.get(s)) for s in grid_steps]})
    drawing = svg(PANEL_WIDTH, PANEL_HEIGHT, "".join(parts), panel["title"], "lines", **hover_attributes(x, y))
    hover = {"x": grid_steps, "xName": "step", "percent": percent, "series": hover_series}
    caption = tag("figcaption", esc(panel["title"]) + _latest(panel, prepared, percent), cls="panel-title")
    note = tag("p", esc(panel["note"]), cls="note") if panel.get("note") else ""
    return tag("figure", caption + drawing + note + island(hover), cls="panel", data_chart="panel")


def _panel_line(steps: list[float], values: list[float | None], colour: str, x: Scale, y: Scale) -> str:
    def points(ys: list[float | None]) -> str:
        return line_path([(x(s), None if v is None else y(v)) for s, v in zip(steps, ys, strict=True)])

    if len(values) < SMOOTH_FROM:
        return f'<path class="line panel-line" d="{points(values)}" style="stroke:{colour}"/>'
    smooth = running_mean(values, max(2, len(values) // 40))
    raw = f'<path class="line raw" d="{points(values)}" style="stroke:{colour}"/>'
    return raw + f'<path class="line panel-line" d="{points(smooth)}" style="stroke:{colour}"/>'


def _latest(panel: dict, prepared: list[tuple], percent: bool) -> str:
    """The last value of each series beside the panel's title: the legend and the reading in one."""
    out = []
    for (_, values, colour), series in zip(prepared, panel["series"], strict=True):
        last = next((v for v in reversed(values) if v is not None), None)
        name = f"{esc(series['label'])} " if len(prepared) > 1 else ""
        out.append(tag("span", name + tag("b", esc(number(last, percent=percent))), style=f"color:{colour}"))
    return tag("span", "".join(out), cls="latest")
