"""Line charts as inline SVG, coloured by the CSS variables of the page they stand in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Series", "line_chart", "sample_evenly", "smooth", "sparkline", "ticks"]

LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 30
MAX_POINTS = 1500
"""A longer series is thinned for drawing: a screen has no more columns to show."""


@dataclass(frozen=True)
class Series:
    """One curve: ``css`` names its class (``raw``, ``smooth``, ``eval`` ...) in the page's style sheet."""

    name: str
    css: str
    points: Sequence[tuple[float, float]]


def smooth(values: Sequence[float], weight: float = 0.8) -> list[float]:
    """Mean of an exponential moving average run forwards and one run backwards, so it does not lag.

    Each average is divided by the weight it has seen so far, which removes the pull of its start value.
    """

    def average(sequence: Sequence[float]) -> list[float]:
        out, total, seen = [], 0.0, 0.0
        for value in sequence:
            total = weight * total + (1 - weight) * value
            seen = weight * seen + (1 - weight)
            out.append(total / seen)
        return out

    backwards = average(list(values)[::-1])[::-1]
    return [(a + b) / 2 for a, b in zip(average(values), backwards)]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def sample_evenly(points: Sequence[tuple[float, float]], limit: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most ``limit`` of the points, the first and the last among them."""
    if len(points) <= limit:
        return list(points)
    stride = (len(points) - 1) / (limit - 1)
    return [points[round(i * stride)] for i in range(limit)]


def tick_label(value: float) -> str:
    """A short number for an axis: 0.05, 1.5, 2000 as 2k, 0.0002 as 2e-4."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value / 1000:g}k"
    return f"{round(value, 6):g}"


def _range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if high == low:
        pad = abs(high) * 0.1 or 1.0
        return (low if from_zero and low == 0 else low - pad), high + pad
    return low if from_zero and low == 0 else low - 0.04 * (high - low), high + 0.06 * (high - low)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    width: int = 340,
    height: int = 170,
    unit: str = "",
    from_zero: bool = False,
    x_name: str = "step",
) -> Markup:
    """An SVG chart over the training step, or what x_name says; an empty string when no series has a finite point."""
    kept = [Series(s.name, s.css, sample_evenly([p for p in s.points if math.isfinite(p[1])])) for s in series]
    kept = [s for s in kept if s.points]
    if not kept:
        return Markup("")
    xs = [x for s in kept for x, _ in s.points]
    x0, x1 = min(xs), max(xs)
    if x0 == x1:
        x0, x1 = x0 - 0.5, x1 + 0.5
    y0, y1 = _range([y for s in kept for _, y in s.points], from_zero)

    def px(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (width - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(TOP + (y1 - y) / (y1 - y0) * (height - TOP - BOTTOM), 1)

    parts = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img">').format(width, height)]
    parts.append(Markup("<title>{}</title>").format(title))
    parts += _axes(px, py, ticks(x0, x1, width // 85), ticks(y0, y1, height // 45), (width, height), x_name)
    for s in kept:
        parts += _curve(s.css, [(px(x), py(y)) for x, y in s.points])
    parts.append(Markup('<line class="cursor" y1="{}" y2="{}"/>').format(TOP, height - BOTTOM))
    parts.append(Markup("</svg>"))
    data = [{"name": s.name, "css": s.css, "points": [[x, _short(y)] for x, y in s.points]} for s in kept]
    frame = {"x0": x0, "x1": x1, "left": LEFT, "right": RIGHT, "width": width, "unit": unit, "x": x_name}
    return Markup('<div class="plot" data-plot="{}">{}<div class="tip" hidden></div></div>').format(
        json.dumps(frame | {"series": data}, separators=(",", ":")), Markup("").join(parts)
    )


def _curve(css: str, pixels: Sequence[tuple[float, float]]) -> list[Markup]:
    """A line through the points, and a dot on each where they are few."""
    path = " ".join(f"{'L' if i else 'M'}{x} {y}" for i, (x, y) in enumerate(pixels))
    dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.4"/>')
    dots = [dot.format(css, x, y) for x, y in pixels] if len(pixels) <= 40 else []
    return [Markup('<path class="line {}" d="{}"/>').format(css, path), *dots]


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _axes(
    px: Callable[[float], float],
    py: Callable[[float], float],
    x_ticks: list[float],
    y_ticks: list[float],
    size: tuple[int, int],
    x_name: str,
) -> list[Markup]:
    width, height = size
    grid = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    label = Markup('<text class="tick {}" x="{}" y="{}">{}</text>')
    parts = []
    for y in y_ticks:
        parts.append(grid.format(LEFT, width - RIGHT, py(y), py(y)))
        parts.append(label.format("y", LEFT - 7, py(y) + 3.5, tick_label(y)))
    for x in (x for x in x_ticks if float(x).is_integer()):
        parts.append(label.format("x", px(x), height - BOTTOM + 16, f"{int(x)}"))
    parts.append(label.format("x name", width - RIGHT, height - 2, x_name))
    return parts


def sparkline(values: Sequence[float], width: int = 96, height: int = 22) -> Markup:
    """Bars of a layer's singular values, largest first, scaled to the largest."""
    top = max(values, default=0.0)
    if top <= 0:
        return Markup("")
    shown = list(values)[:32]
    step = width / len(shown)
    bar = Markup('<rect x="{}" y="{}" width="{}" height="{}"/>')
    bars = [
        bar.format(round(i * step, 1), round(height * (1 - v / top), 1), round(max(step - 1, 0.8), 1),
                   round(max(height * v / top, 0.5), 1))
        for i, v in enumerate(shown)
    ]  # fmt: skip
    title = escape(f"singular values, largest {top:.3g}, smallest {min(values):.3g}")
    return Markup('<svg class="spark" viewBox="0 0 {} {}" width="{}" height="{}"><title>{}</title>{}</svg>').format(
        width, height, width, height, title, Markup("").join(bars)
    )
