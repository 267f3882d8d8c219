"""Line charts as SVG text without a library or a script, readable without colour: lines differ in mark and dashes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from posenc.display.viz import COLOURS

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 34
DASHES = ("", "6 3", "2 2")
MARKS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0",
    "M-3 -3h6v6h-6z",
    "M0 -3.6L3.6 3H-3.6z",
    "M0 -4L4 0L0 4L-4 0z",
    "M-3 -3L3 3M3 -3L-3 3",
)


@dataclass(frozen=True)
class ChartPoint:
    """A value and its standard error; NaN for an unknown error."""

    x: float
    y: float
    error: float


@dataclass(frozen=True)
class Axis:
    """Maps values to pixels, linearly or by their logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool

    def __call__(self, value: float) -> float:
        """Pixel of a value; values outside the axis are drawn at its edge."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, self._inside(value)))
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.stop - self.start)

    def _inside(self, value: float) -> float:
        return min(max(value, self.low), self.high)


def line_chart(
    series: Mapping[str, Sequence[ChartPoint]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = True,
    log_y: bool = False,
    window: int | None = None,
    bounds: tuple[float, float] | None = None,
) -> str:
    """A chart with error bars of one standard error, and its legend; values that are not numbers are left out.

    Parameters
    ----------
    series : dict of str to sequence of ChartPoint
        By label.
    window : int, optional
        Marked on the x axis.
    bounds : (float, float), optional
        Lowest and highest value drawn; higher values are drawn there, as an arrow.
    """
    drawn = {label: [p for p in points if math.isfinite(p.y)] for label, points in series.items()}
    every = [point for points in drawn.values() for point in points]
    if not every:
        return ""
    x_axis = _axis([p.x for p in every], LEFT, WIDTH - RIGHT, log=log_x)
    y_axis = _axis(bounds or [p.y for p in every], HEIGHT - BOTTOM, TOP, log=log_y)
    parts = [_grid(x_axis, y_axis, sorted({p.x for p in every}), log_y=log_y)]
    if window is not None and x_axis.low <= window <= x_axis.high:
        at = x_axis(window)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="window"/>')
    parts += [_line(points, number, x_axis, y_axis) for number, points in enumerate(drawn.values())]
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text x="10" y="{middle}" text-anchor="middle" transform="rotate(-90 10 {middle})">{escape(y_label)}</text>'
    )
    name = escape(title)
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}"><title>{name}</title>'
    picture = f"{opening}{''.join(parts)}</svg>"
    return f'<figure>{picture}<figcaption class="legend">{_legend(list(drawn))}</figcaption></figure>'


def style(number: int) -> tuple[str, str, str]:
    """Colour, dashes and mark of the line of that number; the first hundred all differ."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)], MARKS[number % len(MARKS)]


def ticks(low: float, high: float, *, log: bool) -> list[float]:
    """Four or so round numbers between two values."""
    if log:
        rounds = [m * 10.0**e for e in range(-3, 8) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        return rounds if len(rounds) >= 2 else [low, high]
    step = 10.0 ** math.floor(math.log10((high - low) / 3)) if high > low else 1.0
    step *= next((m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 6), 10)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]


def _axis(values: Sequence[float], start: float, stop: float, *, log: bool) -> Axis:
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.05, high * 1.05, start, stop, True)
    margin = 0.04 * (high - low or 1.0)
    return Axis(low - margin, high + margin, start, stop, False)


def _grid(x_axis: Axis, y_axis: Axis, xs: Sequence[float], *, log_y: bool) -> str:
    parts = []
    for value in ticks(y_axis.low, y_axis.high, log=log_y):
        y = y_axis(value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 3:.1f}" text-anchor="end">{value:g}</text>')
    shown = xs if len(xs) <= 7 else ticks(x_axis.low, x_axis.high, log=x_axis.log)
    for value in shown:
        x = x_axis(value)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 3}" class="tick"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 13}" text-anchor="middle">{value:g}</text>')
    return "".join(parts)


def _line(points: Sequence[ChartPoint], number: int, x_axis: Axis, y_axis: Axis) -> str:
    colour, dashes, mark = style(number)
    at = [(x_axis(p.x), y_axis(p.y), p) for p in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in at)
    parts = [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4" stroke-dasharray="{dashes}"/>'
    ]
    for x, y, point in at:
        if math.isfinite(point.error) and point.error > 0:
            low, high = y_axis(max(point.y - point.error, y_axis.low)), y_axis(point.y + point.error)
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{colour}"/>')
        shape = "M-4 2L0 -4L4 2" if point.y > y_axis.high else mark
        parts.append(f'<path d="{shape}" transform="translate({x:.1f} {y:.1f})" fill="{colour}" stroke="{colour}"/>')
    return "".join(parts)


def _legend(labels: Sequence[str]) -> str:
    entries = []
    for number, label in enumerate(labels):
        colour, dashes, mark = style(number)
        swatch = (
            f'<svg viewBox="0 0 26 10" class="swatch" aria-hidden="true"><path d="M0 5H26" stroke="{colour}" '
            f'stroke-dasharray="{dashes}"/><path d="{mark}" transform="translate(13 5)" fill="{colour}" '
            f'stroke="{colour}"/></svg>'
        )
        entries.append(f"<span>{swatch}{escape(label)}</span>")
    return " ".join(entries)
