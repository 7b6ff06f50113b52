"""Charts of an SAE's evaluation: how often its latents fire, and figures over k or L0 with their intervals."""

from __future__ import annotations

from jaxrl_llm.report.svg import (
    CHARACTER_WIDTH,
    Scale,
    clip,
    domain,
    esc,
    interval,
    line,
    line_path,
    number,
    spread,
    svg,
    tag,
    text,
    ticks,
    y_grid,
)

WIDTH, HEIGHT = 520, 300
DENSITY_WIDTH, DENSITY_HEIGHT = 380, 190
DENSE = -1.0  # log10 of the share of tokens from which a latent is called dense
LABEL_CHARACTERS = 17  # of a point's name on the chart


def plots(charts: list[dict]) -> str:
    """The plots that have a point, side by side."""
    shown = [chart for chart in charts if any(p["value"] is not None for s in chart["series"] for p in s["points"])]
    return tag("div", "".join(plot(chart) for chart in shown), cls="pair") if shown else ""


def plot(chart: dict) -> str:
    """One chart of `schema.Plot`: lines with whiskers, level lines, names at the right end or beside single points."""
    series, levels, percent = colours(chart["series"]), chart.get("levels", []), chart.get("percent", False)
    values = [p.get(key) for s in series for p in s["points"] for key in ("value", "low", "high")] + [level["value"] for level in levels]
    xs = sorted({p["x"] for s in series for p in s["points"]})
    log = chart.get("x_log", False) and xs[0] > 0
    low, high = domain(xs, log=log) if len(xs) == 1 or not any(len(s["points"]) > 1 for s in series) else (xs[0], xs[-1])
    lines = any(len(s["points"]) > 1 for s in series)
    right = 22 + 12 * CHARACTER_WIDTH * (LABEL_CHARACTERS if lines else 0)
    x, y = Scale(low, high, 50, WIDTH - right, log), Scale(*domain(values), HEIGHT - 44, 12)
    parts = [y_grid(y, x.r0, x.r1, percent=percent), _x_axis(x, y.r0, chart["x_label"], xs if lines and log else [])]
    for level in levels:
        parts.append(line(x.r0, y(level["value"]), x.r1, y(level["value"]), "level-line"))
    parts += [_series(s, x, y, percent) for s in series]
    ends = [(s["label"], s["colour"], s["points"][-1]["value"], s["points"][-1]["x"]) for s in series]
    ends = [end for end in ends if end[2] is not None]
    if lines:
        parts.append(_end_names([*((n, c, v) for n, c, v, _ in ends), *((v["label"], "var(--soft)", v["value"]) for v in levels)], y, x.r1))
    else:
        parts.append(_point_names(ends, x, y))
    drawing = svg(WIDTH, HEIGHT, "".join(parts), f"{chart['title']} over {chart['x_label']}", "lines")
    note = tag("p", esc(chart["note"]), cls="note") if chart.get("note") else ""
    return tag("figure", tag("figcaption", esc(chart["title"]), cls="chart-title") + drawing + note, cls="chart plot", data_chart="plot")


def colours(series: list[dict]) -> list[dict]:
    """The series with a colour each: ours blue, baselines grey and others from the palette."""
    fixed = {"ours": "var(--main)", "baseline": "var(--baseline)", "bound": "var(--muted)"}
    out, others = [], 0
    for one in series:
        kind = one.get("kind", "other")
        out.append(one | {"colour": fixed.get(kind, f"var(--c{others % 6})")})
        others += kind not in fixed
    return out


def _series(one: dict, x: Scale, y: Scale, percent: bool) -> str:
    points = [p for p in one["points"] if p["value"] is not None]
    out = [tag("path", d=line_path([(x(p["x"]), y(p["value"])) for p in points]), cls="line strong", style=f"stroke:{one['colour']}")]
    out = out if len(points) > 1 else []
    for p in points:
        low, high = p.get("low"), p.get("high")
        if low is not None and high is not None:
            out.append(line(x(p["x"]), y(low), x(p["x"]), y(high), "whisker", style=f"stroke:{one['colour']}"))
        span = interval(low, high, percent=percent)
        tip = f"{one['label']}\n{number(p['value'], percent=percent)} at {number(p['x'])}" + (f"\n95% {span}" if span else "")
        out.append(tag("circle", cx=x(p["x"]), cy=y(p["value"]), r=4.5, cls="plot-dot", style=f"fill:{one['colour']}", data_tip=tip))
    return "".join(out)


def _x_axis(x: Scale, y: float, label: str, at: list[float]) -> str:
    """The axis with ticks at `at`, or at round values."""
    out = [line(x.r0, y, x.r1, y, "axis")]
    for value in at or ([v for v in _log_values(x) if x.d0 <= v <= x.d1] if x.log else ticks(x.d0, x.d1, 5)):
        out.append(line(x(value), y, x(value), y + 4, "axis"))
        out.append(text(x(value), y + 17, number(value), "tick", "middle"))
    return "".join(out) + text(x.r1, y + 34, label, "axis-name", "end")


def _log_values(x: Scale) -> list[float]:
    """1, 2, 5 times the powers of ten; all whole numbers' tenths where the axis holds less than three of them."""
    values = [m * 10.0**p for p in range(-6, 9) for m in (1, 2, 5)]
    inside = [v for v in values if x.d0 <= v <= x.d1]
    return inside if len(inside) > 1 else ticks(x.d0, x.d1, 4)


def _end_names(ends: list[tuple[str, str, float]], y: Scale, right: float) -> str:
    """Names at the right end of their lines, spread so that none overlap."""
    places = spread([y(value) for _, _, value in ends], 16, y.r1 + 4, y.r0 - 2)
    out = []
    for (name, colour, value), place in zip(ends, places, strict=True):
        out.append(f'<path class="leader" d="M{right + 6:.1f} {y(value):.1f}L{right + 14:.1f} {place:.1f}"/>')
        out.append(text(right + 17, place + 4, clip(name, LABEL_CHARACTERS), "end", style=f"fill:{colour}"))
    return "".join(out)


def _point_names(ends: list[tuple[str, str, float, float]], x: Scale, y: Scale) -> str:
    """Names beside single points, on the side that has room, spread apart."""
    places = spread([y(value) for _, _, value, _ in ends], 15, y.r1 + 4, y.r0 - 4)
    out = []
    for (name, colour, _, at), place in zip(ends, places, strict=True):
        left = x(at) > (x.r0 + x.r1) / 2
        style = f"fill:{colour}"
        out.append(text(x(at) + (-9 if left else 9), place + 4, clip(name, 30), "end point-label", "end" if left else "start", style=style))
    return "".join(out)


def densities(items: list[dict]) -> str:
    """A histogram an SAE, in a grid."""
    return tag("div", "".join(density(item) for item in items), cls="grid")


def density(item: dict) -> str:
    """One `schema.Density`: bars over log10 of the share of tokens, the zone of dense latents shaded, dead ones in words."""
    edges, counts = item["log10_edges"], item["counts"]
    tallest = max(counts, default=0) or 1
    first = next((i for i, count in enumerate(counts) if count), 0)
    start = min(edges[first], -4.0)  # empty bins at the left are left out
    x, y = Scale(start, edges[-1], 44, DENSITY_WIDTH - 10), Scale(0, tallest * 1.05, DENSITY_HEIGHT - 42, 10)
    parts = [tag("rect", x=x(DENSE), y=y.r1, width=x.r1 - x(DENSE), height=y.r0 - y.r1, cls="zone"), y_grid(y, x.r0, x.r1, count=3)]
    for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count and low >= start - 1e-9:
            tip = f"{number(count)} latents\nfire on {number(10**low, percent=True, digits=None)} to {number(10**high, percent=True, digits=None)}"
            width = max(x(high) - x(low) - 0.8, 0.8)
            parts.append(tag("rect", x=x(low) + 0.4, y=y(count), width=width, height=y.r0 - y(count), cls="bar-kept", data_tip=tip))
    parts.append(line(x.r0, y.r0, x.r1, y.r0, "axis"))
    for power in range(int(start), 1):
        parts.append(line(x(power), y.r0, x(power), y.r0 + 4, "axis"))
        parts.append(text(x(power), y.r0 + 17, number(10.0**power, percent=True, digits=max(0, -power - 2)), "tick", "middle"))
    parts.append(text(x.r1, y.r0 + 34, "share of tokens", "axis-name", "end"))
    share = item["dead"] / item["latents"] if item["latents"] else 0.0
    told = tag("span", f"dead <b>{number(item['dead'])}</b> of {number(item['latents'])} ({number(share, percent=True)})", cls="latest")
    drawing = svg(DENSITY_WIDTH, DENSITY_HEIGHT, "".join(parts), f"{item['label']}: latents by the share of tokens they fire on", "lines")
    return tag("figure", tag("figcaption", esc(item["label"]) + told, cls="panel-title") + drawing, cls="panel", data_chart="density")
