"""Charts of the data: what a schedule served over time, difficulty calibration, quality by kind of corruption, interval marks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from jaxrl_llm.report.arms import Arms
from jaxrl_llm.report.charts_lines import island, significant
from jaxrl_llm.report.svg import (
    CHARACTER_WIDTH,
    Scale,
    band_path,
    clip,
    domain,
    esc,
    line,
    line_path,
    number,
    responsive,
    svg,
    tag,
    text,
    x_axis,
    y_grid,
)

MAX_COLUMNS = 60  # of a schedule's drawing: more steps are pooled
HEAT_LEVELS = 8


# ---- schedules ----


def pool_schedule(schedule: dict) -> dict:
    """The schedule in at most MAX_COLUMNS columns: counts summed, quantiles averaged over the steps of a column."""
    steps = schedule["steps"]
    columns = min(MAX_COLUMNS, len(steps))
    edges = [i * len(steps) // columns for i in range(columns + 1)] if columns else [0]
    runs = list(pairwise(edges))
    pooled = {"arm": schedule["arm"], "clusters": schedule.get("clusters", []), "quantiles": {}}
    pooled["from"] = [steps[a] for a, _ in runs]
    pooled["to"] = [steps[b - 1] for _, b in runs]
    for name, values in schedule["quantiles"].items():
        found = [[v for v in values[a:b] if v is not None] for a, b in runs]
        pooled["quantiles"][name] = [sum(vs) / len(vs) if vs else None for vs in found]
    counts = schedule.get("counts", [])
    pooled["counts"] = [[sum(column) for column in zip(*counts[a:b], strict=True)] for a, b in runs] if counts else []
    pooled["effective"] = effective_clusters(counts)
    return pooled


def effective_clusters(counts: Sequence[Sequence[float]]) -> float | None:
    """exp(entropy) of a batch's cluster shares, averaged over the batches: how many clusters a batch holds, in effect."""
    found = []
    for row in counts:
        total = sum(row)
        if total > 0:
            found.append(math.exp(-sum(c / total * math.log(c / total) for c in row if c > 0)))
    return sum(found) / len(found) if found else None


def schedule_charts(schedules: list[dict], arms: Arms) -> list[str]:
    """One figure an arm, all on the same scales."""
    pooled = [pool_schedule(schedule) for schedule in schedules]
    values = [v for p in pooled for qs in p["quantiles"].values() for v in qs]
    top_share = max((c / (sum(row) or 1) for p in pooled for row in p["counts"] for c in row), default=1.0)
    return [_schedule_chart(p, arms, domain(values, pad=0.05), top_share) for p in pooled]


def _schedule_chart(pooled: dict, arms: Arms, difficulty: tuple[float, float], top_share: float) -> str:
    width, left, fan_height = 380, 40, 132
    name, clusters = pooled["arm"], pooled["clusters"]
    columns = len(pooled["from"])
    row_height = max(3.0, min(14.0, 190 / len(clusters))) if clusters and pooled["counts"] else 0.0
    heat_top = fan_height + 26
    heat_bottom = heat_top + row_height * len(clusters) if row_height else fan_height
    first, last = (pooled["from"][0], pooled["to"][-1]) if columns else (0, 1)
    x = Scale(first, max(last, first + 1), left, width - 8)
    y = Scale(*difficulty, fan_height - 8, 8)
    column = (x.r1 - x.r0) / max(columns, 1)
    middles = [x.r0 + (i + 0.5) * column for i in range(columns)]
    parts = [y_grid(y, x.r0, x.r1, count=4), _fan(pooled, middles, y, arms.colour(name))]
    if row_height:
        parts.append(_heat(pooled, arms.colour(name), x.r0, heat_top, column, row_height, top_share))
    parts.append(x_axis(x, heat_bottom + 4, "step", count=4))
    height = heat_bottom + 42
    effective = pooled["effective"]
    spoken = f"Difficulty and clusters of the batches of {arms.label(name)} over time"
    places = f"{x.r0:.1f} {column:.3f} {heat_top} {row_height:.3f}"
    drawing = svg(width, height, "".join(parts), spoken, "lines", data_heat=places, tabindex="0")
    caption = arms.swatch(name) + esc(arms.label(name))
    if effective is not None:
        caption += tag("span", f"a batch holds {number(effective, digits=1)} of {len(clusters)} clusters, in effect", cls="latest")
    hover = {
        "from": pooled["from"],
        "to": pooled["to"],
        "quantiles": {k: [significant(v, 3) for v in vs] for k, vs in pooled["quantiles"].items()},
        "clusters": clusters,
        "shares": [[round(100 * c / (sum(row) or 1)) for c in row] for row in pooled["counts"]],
    }
    return tag("figure", tag("figcaption", caption, cls="panel-title") + drawing + island(hover), cls="panel", data_chart="schedule")


def _fan(pooled: dict, middles: list[float], y: Scale, colour: str) -> str:
    """The median as a line inside the bands of the middle half and the middle 80%."""
    quantiles = pooled["quantiles"]
    out = []
    for low, high, cls in (("10", "90", "fan-outer"), ("25", "75", "fan-inner")):
        if low in quantiles and high in quantiles:
            points = [
                (m, None if lo is None else y(lo), None if hi is None else y(hi))
                for m, lo, hi in zip(middles, quantiles[low], quantiles[high], strict=True)
            ]
            out.append(f'<path class="{cls}" d="{band_path(points)}" style="fill:{colour}"/>')
    if "50" in quantiles:
        points = [(m, None if v is None else y(v)) for m, v in zip(middles, quantiles["50"], strict=True)]
        out.append(f'<path class="line strong" d="{line_path(points)}" style="stroke:{colour}"/>')
    return "".join(out)


def _heat(pooled: dict, colour: str, left: float, top: float, column: float, row_height: float, top_share: float) -> str:
    """Clusters by time: one path a shade, so that thousands of cells stay small."""
    paths = [""] * (HEAT_LEVELS + 1)
    for i, row in enumerate(pooled["counts"]):
        total = sum(row) or 1
        for j, count in enumerate(row):
            level = math.ceil(HEAT_LEVELS * count / total / top_share - 1e-9)
            if level > 0:
                x, y = left + i * column, top + j * row_height
                paths[min(level, HEAT_LEVELS)] += f"M{x:.1f} {y:.1f}h{column:.1f}v{row_height - 0.6:.1f}h-{column:.1f}z"
    shade = f"fill:{colour};fill-opacity:"
    out = [f'<path d="{d}" style="{shade}{i / HEAT_LEVELS:.2f}"/>' for i, d in enumerate(paths) if d]
    labels = pooled["clusters"]
    every = 1 if row_height >= 9.5 else math.ceil(10 / row_height)
    for j in range(0, len(labels), every):
        out.append(text(left - 8, top + (j + 0.5) * row_height + 3.6, clip(labels[j], 6), "tick small", "end"))
    right, bottom = left + column * len(pooled["counts"]), top + row_height * len(labels)
    out.append(f'<path class="frame" d="M{left - 0.5:.1f} {top - 1:.1f}H{right + 0.5:.1f}V{bottom:.1f}H{left - 0.5:.1f}z"/>')
    return "".join(out)


# ---- calibration ----


def calibration_charts(calibration: dict) -> list[str]:
    """One figure a predictor, on the same axes: predicted against observed, dots sized by count."""
    quantity = calibration.get("quantity", "fail rate")
    every = [b for series in calibration["series"] for b in series["bins"]]
    numbers = [v for b in every for v in (b["predicted"], b["observed"], b.get("low"), b.get("high"))]
    low, high = domain(numbers, pad=0.04)
    inside = all(0 <= v <= 1 for v in numbers if v is not None)
    limits = (max(low, 0.0), min(high, 1.0)) if inside else (low, high)
    biggest = max((b["count"] for b in every), default=1) or 1
    return [
        _calibration_chart(series, quantity, limits, biggest, series.get("main", i == 0)) for i, series in enumerate(calibration["series"])
    ]


def _calibration_chart(series: dict, quantity: str, limits: tuple[float, float], biggest: int, main: bool) -> str:
    width, height = 380, 340
    colour = "var(--main)" if main else "var(--baseline)"
    x, y = Scale(*limits, 44, width - 14), Scale(*limits, height - 44, 12)
    parts = [y_grid(y, x.r0, x.r1), x_axis(x, y.r0, f"predicted {quantity}", count=5)]
    parts.append(line(x.r0, y.r0, x.r1, y.r1, "diagonal"))
    parts.append(text(x.r0 + 6, y.r1 + 10, f"observed {quantity}", "axis-name"))
    for entry in sorted(series["bins"], key=lambda b: -b["count"]):
        px, py = x(entry["predicted"]), y(entry["observed"])
        low, high = entry.get("low"), entry.get("high")
        if low is not None and high is not None:
            parts.append(line(px, y(low), px, y(high), "whisker", style=f"stroke:{colour}"))
        tip = f"predicted {number(entry['predicted'], digits=2)}, observed {number(entry['observed'], digits=2)}"
        tip += (f"\n95% {interval_text(low, high)}" if low is not None and high is not None else "") + f"\n{number(entry['count'])} prompts"
        radius = 3 + 11 * math.sqrt(entry["count"] / biggest)
        parts.append(tag("circle", cx=px, cy=py, r=radius, cls="bubble", style=f"fill:{colour};stroke:{colour}", data_tip=tip))
        parts.append(text(px, py - radius - 4 if radius > 9 else py - radius - 5, number(entry["count"]), "count", "middle"))
    caption = esc(series["name"])
    spearman = series.get("spearman")
    if spearman:
        span = interval_text(spearman.get("low"), spearman.get("high"))
        caption += tag("span", f"Spearman <b>{number(spearman['value'], digits=2)}</b>" + (f" ({span})" if span else ""), cls="latest")
    drawing = svg(width, height, "".join(parts), f"{series['name']}: predicted against observed {quantity}", "lines")
    return tag("figure", tag("figcaption", caption, cls="panel-title") + drawing, cls="panel", data_chart="calibration")


def interval_text(low: float | None, high: float | None) -> str:
    """An interval in words, empty where an end is missing."""
    return "" if low is None or high is None else f"{number(low, digits=2)} to {number(high, digits=2)}"


# ---- quality ----


def histogram(values: Sequence[float], low: float, high: float, bins: int) -> list[int]:
    """Counts in `bins` equal bins of [low, high]; the ends hold what lies outside."""
    counts = [0] * bins
    span = (high - low) or 1.0
    for value in values:
        counts[min(max(int((value - low) / span * bins), 0), bins - 1)] += 1
    return counts


def quality_chart(quality: dict) -> str:
    """A row a kind of corruption, each a histogram of its own scores, with the cut through all of them."""
    kinds = {kind: [v for v in values if v is not None] for kind, values in quality["scores"].items()}
    kinds = {kind: values for kind, values in kinds.items() if values}
    drawn = responsive(lambda width: _draw_quality(quality, kinds, width), (("m", 780), ("s", 540), ("xs", 348)))
    return tag("figure", drawn, cls="chart quality", data_chart="quality")


def _draw_quality(quality: dict, kinds: dict[str, list[float]], width: int) -> str:
    narrow, cut = width < 460, quality["cut"]
    left, right, row, top = (10 if narrow else 150), (14 if narrow else 120), (74 if narrow else 62), 26
    everything = sorted(v for values in kinds.values() for v in values)
    trim = len(everything) // 200  # the outer 0.5% go into the outer bins
    low, high = (min(everything[trim], cut), max(everything[-1 - trim], cut)) if everything else (0.0, 1.0)
    x = Scale(low, high, left, width - right)
    bins = 36 if narrow else 64
    # One bin edge lies on the cut, so that every bar is wholly kept or wholly dropped.
    step = (high - low) / bins or 1.0
    start = cut - math.ceil((cut - low) / step - 1e-9) * step
    bottom = top + row * len(kinds)
    parts = []
    for i, (kind, values) in enumerate(kinds.items()):
        base = top + row * (i + 1) - 12
        counts = histogram(values, start, start + step * (bins + 1), bins + 1)
        tallest = max(counts)
        scale = (row - (34 if narrow else 22)) / (tallest or 1)
        bars = {True: "", False: ""}
        for j, count in enumerate(counts):
            if count:
                at = max(start + j * step, low)
                bar = max(x(min(start + (j + 1) * step, high)) - x(at) - 0.7, 0.8)
                bars[start + j * step >= cut - 1e-9] += f"M{x(at):.1f} {base}v-{count * scale:.1f}h{bar:.1f}v{count * scale:.1f}z"
        parts.append(f'<path class="bar-kept" d="{bars[True]}"/><path class="bar-dropped" d="{bars[False]}"/>')
        parts.append(line(x.r0, base, x.r1, base, "axis"))
        strong = "row-name clean" if kind == quality.get("clean", "clean") else "row-name"
        parts.append(_quality_labels(kind, values, cut, strong, width, base, row))
    parts.append(line(x(cut), top - 6, x(cut), bottom - 12, "cut"))
    parts.append(_cut_label(cut, x(cut), top - 8, width))
    parts.append(x_axis(x, bottom - 12, quality.get("label", "quality score"), count=4 if narrow else 6))
    spoken = f"Histogram of {quality.get('label', 'quality score')} by kind of corruption, cut at {number(cut)}"
    return svg(width, bottom + 28, "".join(parts), spoken, "lines")


def _cut_label(cut: float, x: float, y: float, width: int) -> str:
    """What the line means, on the side of it that has room; just its value where neither has."""
    label = f"cut {number(cut)}: dropped to the left"
    room = len(label) * 12.5 * (CHARACTER_WIDTH + 0.08) + 6  # bold is wider
    if x + room < width:
        return text(x + 6, y, label, "cut-label")
    return text(x - 6, y, label if x > room else f"cut {number(cut)}", "cut-label", "end")


def _quality_labels(kind: str, values: list[float], cut: float, strong: str, width: int, base: float, row: float) -> str:
    """The kind's name and size on the left, the share that the cut drops on the right."""
    dropped = sum(v < cut for v in values)
    share = number(dropped / len(values), percent=True, digits=0)
    if width < 460:
        size = tag("tspan", number(len(values)), cls="row-count", dx="6")
        name = tag("text", esc(clip(kind, 22)) + size, x=10.0, y=base - row + 32, cls=strong)
        return name + text(width - 14, base - row + 32, f"{share} dropped", "row-share", "end")
    out = text(0, base - 20, clip(kind, int(150 / (14 * CHARACTER_WIDTH))), strong)
    out += text(0, base - 4, f"{number(len(values))} prompts", "row-count")
    out += text(width, base - 20, share, "row-share", "end")
    return out + text(width, base - 4, f"dropped ({number(dropped)})", "row-count", "end")


# ---- interval marks in table cells ----


def interval_mark(estimate: dict, limits: tuple[float, float], *, colour: str = "var(--ink)", zero: bool = False, width: int = 120) -> str:
    """A dot with its whisker on a scale shared by a table, a zero line where the sign matters; hollow where the interval holds zero."""
    x = Scale(limits[0], limits[1] if limits[1] > limits[0] else limits[0] + 1, 5, width - 5)
    low, high = estimate.get("low"), estimate.get("high")
    parts = [line(0, 8, width, 8, "mark-rail")]
    if zero:
        parts.append(line(x(0), 0, x(0), 16, "mark-zero"))
    if low is not None and high is not None:
        parts.append(line(x(low), 8, x(high), 8, "mark-whisker", style=f"stroke:{colour}"))
    hollow = zero and low is not None and high is not None and low <= 0 <= high
    fill = f"fill:var(--page);stroke:{colour}" if hollow else f"fill:{colour};stroke:{colour}"
    parts.append(tag("circle", cx=x(estimate["value"]), cy=8.0, r=3.5, cls="mark-dot", style=fill))
    return f'<svg class="mark" viewBox="0 0 {width} 16" width="{width}" height="16" aria-hidden="true">{"".join(parts)}</svg>'


def mark_limits(estimates: Sequence[dict | None], *, zero: bool = False) -> tuple[float, float]:
    """The common scale of a table's marks."""
    values = [e.get(key) for e in estimates if e for key in ("value", "low", "high")] + ([0.0] if zero else [])
    found = [v for v in values if v is not None]
    return (min(found), max(found)) if found else (0.0, 1.0)
