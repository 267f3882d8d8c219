"""Pictures: position maps, distance curves, results. They need matplotlib, which is imported when one is drawn.

Long plans are sampled: no picture allocates an L x L array for a large L.
"""

from __future__ import annotations

import base64
import io
import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posenc.display.explain import relative_at
from posenc.errors import InvalidInputError, PosencError
from posenc.files import expanded, replacing
from posenc.plan import PositionPlan
from posenc.segment import Positions

MAP_SIDE = 400
CURVE_POINTS = 1000
FORMATS = (".png", ".pdf", ".svg")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
BEYOND = "0.7"
MARKERS = "osD^vPX"

_drawing = threading.Lock()


def sample_map(plan: PositionPlan, side: int = MAP_SIDE) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Sample relative positions on a grid of at most ``side`` rows and columns.

    Parameters
    ----------
    plan : PositionPlan
        A plan of any length; memory depends on `side` only.
    side : int
        Largest number of sampled queries, and of sampled keys.

    Returns
    -------
    (int64 [S], float64 [S, S])
        The sampled indices, and ``q[i] - k[j]`` at them: NaN where a pair is not attended, and the largest value
        where positions differ per frequency.
    """
    index = np.unique(np.linspace(0, plan.total - 1, min(plan.total, side)).round().astype(np.int64))
    relative = np.full((len(index), len(index)), np.nan)
    for segment in plan.segments:
        start, stop = segment.key_start[index, None], segment.key_stop[index, None]
        attended = (index >= start) & (index < stop)
        largest = _largest_relative(segment.query_positions[index], segment.key_positions[index])
        relative[attended] = largest[attended]
    return index, relative


def _largest_relative(query: Positions, key: Positions) -> NDArray[np.float64]:
    """``q[i] - k[j]`` of all pairs, the largest over frequencies; [S, S] from positions [S] or [S, F]."""
    largest = np.full((len(query), len(key)), -np.inf)
    for frequency in range(max(positions.shape[1] if positions.ndim > 1 else 1 for positions in (query, key))):
        q = query[:, frequency] if query.ndim > 1 else query
        k = key[:, frequency] if key.ndim > 1 else key
        np.maximum(largest, q[:, None] - k[None, :], out=largest)
    return largest


def distance_curve(plan: PositionPlan, query: int, points: int = CURVE_POINTS) -> tuple[list[int], list[float]]:
    """Sample distances, and the relative positions that one query sees them at; NaN where a key is not attended."""
    spread = np.unique(np.linspace(0, query, min(query + 1, points)).round().astype(int))
    distances = [int(distance) for distance in spread]
    pairs = [relative_at(plan, query, distance) for distance in distances]
    return distances, [float("nan") if pair is None else pair[1] for pair in pairs]


def plot_plan(plan: PositionPlan, path: str | Path) -> Path:
    """Draw the position map and the distance curve of a plan into a file.

    Raises
    ------
    PosencError
        If matplotlib is not installed.
    InvalidInputError
        If the file cannot be written; no half-written file is left.
    """
    return save(plan_figure(plan), path)


def plan_figure(plan: PositionPlan) -> Any:
    """Draw the position map and the distance curve of a plan side by side."""
    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    draw_map(left, plan, title=title(plan))
    draw_curve(right, plan)
    return figure


def plot_maps(plans: Mapping[str, PositionPlan], path: str | Path) -> Path:
    """Draw the position maps of several plans side by side, on one colour scale that ends at the window."""
    figure = new_figure(3.4 * len(plans), 3.6)
    axes = np.atleast_1d(figure.subplots(1, len(plans), sharey=True))
    highest = max(min(plan.max_relative, plan.window or math.inf) for plan in plans.values())
    for axis, (label, plan) in zip(axes, plans.items(), strict=True):
        draw_map(axis, plan, title=f"{label}: up to {plan.max_relative:g}", highest=highest, bar=axis is axes[-1])
    return save(figure, path)


def plot_lines(
    series: Mapping[str, Sequence[tuple[float, float, float]]],
    path: str | Path,
    *,
    title: str,
    ylabel: str,
    window: int | None,
    log: bool = False,
) -> Path:
    """Draw one line per label over the input length, from points (length, value, standard error)."""
    figure = new_figure(6.4, 4.4)
    axis = figure.subplots()
    for number, (label, points) in enumerate(series.items()):
        x, y, error = zip(*points, strict=True)
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        axis.errorbar(x, y, yerr=error, label=label, capsize=3, linewidth=1.5, markersize=5, **style)
    ticks = sorted({point[0] for points in series.values() for point in points})
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    if log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
    if window is not None:
        axis.axvline(window, color="grey", linestyle=":", linewidth=1, label=f"window {window}")
    axis.set(title=title, xlabel="input length (tokens)", ylabel=ylabel)
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize=8)
    return save(figure, path)


def draw_map(axis: Any, plan: PositionPlan, *, title: str, highest: float | None = None, bar: bool = True) -> None:
    """Draw relative positions over the (query, key) plane: blank where not attended, grey beyond the window."""
    _, relative = sample_map(plan)
    if highest is None:
        highest = min(plan.max_relative, plan.window or math.inf)
    from matplotlib import colormaps

    colours = colormaps["viridis"].with_extremes(over=BEYOND)
    image = axis.imshow(
        np.ma.masked_invalid(relative),
        extent=(0, plan.total, plan.total, 0),
        cmap=colours,
        interpolation="nearest",
        vmin=0,
        vmax=highest,
    )
    if bar:
        axis.figure.colorbar(image, ax=axis, shrink=0.85, extend="max", label="relative position (grey: beyond window)")
    axis.set_title(title, fontsize=10)
    axis.set(xlabel="key j", ylabel="query i")


def draw_curve(axis: Any, plan: PositionPlan) -> None:
    """Draw the relative position over distance, for the last query and one in the middle."""
    last, middle = plan.total - 1, (plan.total - 1) // 2
    axis.plot([0, last], [0, last], color="grey", linewidth=0.8, linestyle="--", label="plain RoPE")
    for query, colour, style in ((last, COLOURS[0], "-"), (middle, COLOURS[1], "--")):
        axis.plot(*distance_curve(plan, query), style, color=colour, linewidth=1.8, label=f"query {query}")
    if plan.window is not None:
        axis.axhline(plan.window, color="black", linestyle=":", linewidth=1, label=f"window {plan.window}")
    axis.set_title("relative position of each distance", fontsize=10)
    axis.set(xlabel="distance i - j", ylabel="relative position")
    axis.set_ylim(bottom=0, top=1.2 * max(plan.max_relative, plan.window or 1.0))
    axis.legend(fontsize=8)


def new_figure(width: float, height: float) -> Any:
    """Make a figure outside pyplot: it needs no display and changes nothing global.

    Raises
    ------
    PosencError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise PosencError("plots need matplotlib, which is not installed. Run: pip install 'posenc[plot]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: str | Path) -> Path:
    """Write a figure to a temporary file beside `path`, then move it there in one step.

    Raises
    ------
    InvalidInputError
        If the file has no ending of a plot, or cannot be written.
    """
    target = expanded(path)
    if target.suffix.lower() not in FORMATS:
        raise InvalidInputError(f"{target}: a plot file must end in {', '.join(FORMATS)}.")
    with replacing(target) as temporary:
        figure.savefig(temporary, dpi=130)
    return target


def data_uri(figure: Any, dpi: int = 100) -> str:
    """Encode a figure as a PNG data URI, for pages without picture files."""
    content = io.BytesIO()
    with _drawing:  # threads share matplotlib's font cache
        figure.savefig(content, format="png", dpi=dpi)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def title(plan: PositionPlan) -> str:
    """Name a plan in a few words."""
    total = "" if plan.total == plan.prompt else f", total {plan.total}"
    return f"{plan.strategy or 'plan'}: prompt {plan.prompt}{total}"
