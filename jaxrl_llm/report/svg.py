"""The small kit that the charts are drawn with: escaping, number formats, scales, ticks, paths and label spreading.

Everything returns strings of HTML or inline SVG. Colours are CSS variables, so that one drawing serves light and dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CHARACTER_WIDTH = 0.56  # of the font size, on average, in system sans-serif fonts: enough to reserve room for a label


def esc(value: object) -> str:
    """The text, safe inside an element or a double-quoted attribute."""
    return html.escape(str(value), quote=True)


def tag(name: str, content: str = "", **attributes: object) -> str:
    """`<name k="v">content</name>`; `cls` is class, `_` becomes `-`, None attributes are left out. `content` must be safe already."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            key = "class" if key == "cls" else key.replace("_", "-")
            parts.append(f'{key}="{esc(coordinate(value) if isinstance(value, float) else value)}"')
    return f"<{' '.join(parts)}>{content}</{name}>"


def coordinate(value: float) -> str:
    """A pixel position in at most one decimal: 12, 12.5."""
    return f"{value:.1f}".removesuffix(".0")


# ---- numbers for people ----


def number(value: float | None, *, percent: bool = False, signed: bool = False, digits: int | None = None) -> str:
    """42.3%, 0.715, 1,204, -1.6: fractions as percent where `percent`, a true minus sign, an en dash where there is no number."""
    if value is None:
        return "–"
    if percent:
        body = f"{abs(value) * 100:.{1 if digits is None else digits}f}"
    elif digits is not None:
        body = f"{abs(value):,.{digits}f}"
    elif value == int(value) and abs(value) < 1e7:
        body = f"{abs(value):,.0f}"
    elif abs(value) >= 100:
        body = f"{abs(value):,.0f}" if abs(value) < 1e6 else f"{abs(value):.3g}"
    elif abs(value) >= 0.001:
        body = f"{abs(value):.3g}"
    else:
        body = f"{abs(value):.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e-", "e−")
    is_zero = not any(c in "123456789" for c in body)
    sign = "−" if value < 0 and not is_zero else "+" if signed and not is_zero else ""
    return sign + body + ("%" if percent and not signed else "")


def interval(low: float | None, high: float | None, **how: bool | int | None) -> str:
    """An interval as "2.6 to 4.1"; nothing where an end is missing."""
    if low is None or high is None:
        return ""
    return f"{number(low, **how).removesuffix('%')} to {number(high, **how)}"  # pyright: ignore[reportArgumentType]


def duration(seconds: float) -> str:
    """8.2 s, 4 min 05 s, 3 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def clip(text: str, limit: int) -> str:
    """The text, cut with an ellipsis where it is longer than `limit` characters."""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


# ---- scales ----


@dataclass(frozen=True)
class Scale:
    """Maps the data interval [d0, d1] to the pixels [r0, r1], linearly or by logarithm."""

    d0: float
    d1: float
    r0: float
    r1: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            span = math.log(self.d1) - math.log(self.d0)
            share = (math.log(max(value, 1e-300)) - math.log(self.d0)) / (span or 1.0)
        else:
            share = (value - self.d0) / ((self.d1 - self.d0) or 1.0)
        return self.r0 + share * (self.r1 - self.r0)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values inside [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / max(count, 1)
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], thinned to at most five."""
    powers = list(range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1))
    every = max(1, math.ceil(len(powers) / 5))
    return [10.0**p for p in powers[::every]] or [low, high]


def domain(values: Iterable[float | None], *, pad: float = 0.06, log: bool = False) -> tuple[float, float]:
    """The interval that holds all the values, with a little air; a flat line gets an interval around it.

    A range whose values are all >= 0 never starts below zero.
    """
    found = [v for v in values if v is not None and (v > 0 or not log)]
    if not found:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(found), max(found)
    if log:
        return (low / 1.3, high * 1.3)
    if high - low < 1e-12:
        air = abs(high) * 0.1 or 1.0
    else:
        air = (high - low) * pad
    bottom = low - air
    if low >= 0 and bottom < 0:
        bottom = 0.0
    return bottom, high + air


# ---- shapes ----


def line_path(points: Sequence[tuple[float, float | None]]) -> str:
    """The `d` of a line through pixel points; a None breaks it, and a point with a gap on both sides is drawn as a dot."""
    out, pen = [], False
    for i, (x, y) in enumerate(points):
        if y is None:
            pen = False
            continue
        out.append(f"{'L' if pen else 'M'}{coordinate(x)} {coordinate(y)}")
        last = i + 1 == len(points) or points[i + 1][1] is None
        if not pen and last:
            out.append("h.01")
        pen = True
    return "".join(out)


def band_path(points: Sequence[tuple[float, float | None, float | None]]) -> str:
    """The `d` of an area between two lines; gaps split it."""
    runs: list[list[tuple[float, float, float]]] = [[]]
    for x, low, high in points:
        if low is None or high is None:
            runs.append([])
        else:
            runs[-1].append((x, low, high))
    out = []
    for run in runs:
        if len(run) > 1:
            there = "L".join(f"{coordinate(x)} {coordinate(high)}" for x, _, high in run)
            back = "L".join(f"{coordinate(x)} {coordinate(low)}" for x, low, _ in reversed(run))
            out.append(f"M{there}L{back}Z")
    return "".join(out)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions nearest to the wanted ones (least squares) that are `gap` apart, in the same order, inside [low, high].

    The gap shrinks where there are too many for the room. With the gaps taken out this is isotonic regression, solved by
    pooling adjacent violators.
    """
    if not wanted:
        return []
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    pools: list[list[float]] = []  # [sum, count] of neighbours that move as one
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    level = [total / count for total, count in pools for _ in range(int(count))]
    top = high - (len(wanted) - 1) * gap
    result = [0.0] * len(wanted)
    for rank, i in enumerate(order):
        result[i] = min(max(level[rank], low), top) + rank * gap
    return result


def text(x: float, y: float, content: object, cls: str = "", anchor: str | None = None, **more: Any) -> str:
    """A text element."""
    return tag("text", esc(content), x=float(x), y=float(y), cls=cls or None, text_anchor=anchor, **more)


def line(x1: float, y1: float, x2: float, y2: float, cls: str, **more: Any) -> str:
    """A straight line."""
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), cls=cls, **more)


def svg(width: float, height: float, content: str, label: str, cls: str = "", **more: object) -> str:
    """An inline drawing with its spoken description."""
    return tag(
        "svg",
        content,
        viewBox=f"0 0 {coordinate(width)} {coordinate(height)}",
        role="img",
        aria_label=label,
        cls=cls or None,
        **more,
    )


def responsive(draw: Callable[[int], str], widths: Sequence[tuple[str, int]]) -> str:
    """The same chart drawn once for each width class; the style sheet shows the one that fits, so that text keeps its size."""
    return "".join(tag("div", draw(width), cls=f"at-{name}") for name, width in widths)


FULL_WIDTHS = (("l", 1040), ("m", 780), ("s", 540), ("xs", 348))


def x_axis(scale: Scale, y: float, label: str, *, count: int = 6, percent: bool = False) -> str:
    """Tick labels below the line at `y` and the axis name under their right end."""
    out = [line(scale.r0, y, scale.r1, y, "axis")]
    for value in ticks(scale.d0, scale.d1, count):
        x = scale(value)
        out.append(line(x, y, x, y + 4, "axis"))
        out.append(text(x, y + 17, number(value, percent=percent, digits=0 if percent else None), "tick", "middle"))
    if label:
        out.append(text(scale.r1, y + 34, label, "axis-name", "end"))
    return "".join(out)


def y_grid(scale: Scale, x0: float, x1: float, *, count: int = 5, percent: bool = False) -> str:
    """Hairlines with their values at the left."""
    values = log_ticks(scale.d0, scale.d1) if scale.log else ticks(scale.d0, scale.d1, count)
    digits = 0 if percent and all(abs(v * 100 - round(v * 100)) < 1e-6 for v in values) else None
    out = []
    for value in values:
        y = scale(value)
        out.append(line(x0, y, x1, y, "grid"))
        out.append(text(x0 - 8, y + 4, number(value, percent=percent, digits=digits), "tick", "end"))
    return "".join(out)
