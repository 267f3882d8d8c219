"""The plot of ``posenc bench``: ratio over length, one panel per kind, shape, dtype, thread count and backend."""

from __future__ import annotations

from pathlib import Path

from posenc.bench.results import BenchRow, Result
from posenc.display.viz import COLOURS, FORMATS, MARKERS, new_figure, save
from posenc.errors import InvalidInputError


def check_plot(path: Path) -> None:
    """Raise before measuring if the plot could not be drawn afterwards.

    Raises
    ------
    InvalidInputError
        If the file has no ending of a plot.
    PosencError
        If matplotlib is not installed.
    """
    if path.suffix.lower() not in FORMATS:
        raise InvalidInputError(f"{path}: a plot file must end in {', '.join(FORMATS)}.")
    new_figure(1, 1)


def plot_ratios(result: Result, path: Path) -> Path:
    """Draw the median ratios, with bars from the lowest to the highest ratio of a round."""
    panels: dict[str, list[BenchRow]] = {}
    for row in result.rows:
        title = f"{row.kind} {row.shape} {row.dtype}, {row.threads} threads, {row.backend}"
        panels.setdefault(title, []).append(row)
    figure = new_figure(5.2 * len(panels), 4.0)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        for number, name in enumerate(dict.fromkeys(row.strategy for row in rows)):
            curve = sorted((row for row in rows if row.strategy == name), key=lambda row: row.length)
            below = [row.ratio - min(row.ratios) for row in curve]
            above = [max(row.ratios) - row.ratio for row in curve]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
            x, y = [row.length for row in curve], [row.ratio for row in curve]
            axis.errorbar(x, y, yerr=[below, above], label=name, capsize=3, **style)
        ticks = sorted({row.length for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.axhline(1, color="grey", linestyle=":", linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="tokens", ylabel="time, remapped over plain")
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return save(figure, path)
