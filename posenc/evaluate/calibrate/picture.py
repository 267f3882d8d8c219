"""The V-curves: loss over a parameter, one panel per length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from posenc.calibration.file import LossScore
from posenc.display.viz import COLOURS, MARKERS, new_figure, save
from posenc.evaluate.calibrate.sweep import CandidateSweep


def swept_keys(sweep: CandidateSweep) -> tuple[str, str]:
    """The parameter with most values (the x axis), and the other one (empty if there is none)."""
    values: dict[str, set[Any]] = {}
    for point in sweep.points:
        for key, value in point.candidate.params.items():
            values.setdefault(key, set()).add(value)
    keys = sorted(values, key=lambda key: -len(values[key]))
    return keys[0], keys[1] if len(keys) > 1 else ""


def plot_sweeps(sweeps: dict[int, CandidateSweep], native: dict[int, LossScore], path: Path) -> Path:
    """Draw the mean loss of every candidate of one strategy, with the standard error of its gap to the best.

    Dropped candidates are drawn hollow, at the loss of the best one plus the gap measured so far.
    """
    figure = new_figure(3.6 * len(sweeps), 3.8)
    axes = figure.subplots(1, len(sweeps), squeeze=False)[0]
    for axis, (length, sweep) in zip(axes, sorted(sweeps.items()), strict=True):
        x_key, line_key = swept_keys(sweep)
        lines = list(dict.fromkeys(point.candidate.params.get(line_key) for point in sweep.points))
        lowest, heights = sweep.best.losses.mean, [0.0]
        for number, line in enumerate(lines):
            points = [p for p in sweep.points if p.candidate.params.get(line_key) == line]
            points.sort(key=lambda point: float(point.candidate.params[x_key]))
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            gaps = [sweep.behind(point) for point in points]
            x = [point.candidate.params[x_key] for point in points]
            y = [lowest + gap.mean for gap in gaps]
            heights += [gap.mean for gap in gaps]
            errors = [0.0 if math.isnan(gap.standard_error) else gap.standard_error for gap in gaps]
            label = f"{line_key} {line}" if line_key else x_key
            axis.errorbar(x, y, yerr=errors, color=colour, linewidth=1.2, capsize=2, label=label)
            for at, height, point in zip(x, y, points, strict=True):
                face = "white" if sweep.dropped(point) else colour
                axis.plot([at], [height], marker, color=colour, markerfacecolor=face, markersize=5)
        axis.axhline(native[length].loss, color="grey", linestyle=":", linewidth=1, label="native")
        span = min(1.0, max(0.05, *heights))
        axis.set_ylim(lowest - 0.1 * span, lowest + 1.1 * span)
        axis.set_title(f"{sweep.strategy}, {length} tokens", fontsize=9)
        axis.set(xlabel=x_key, ylabel="nats per token")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    return save(figure, path)
