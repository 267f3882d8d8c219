"""The content of a page before it is HTML or Markdown: sections of text, charts, tables, heat maps and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from posenc.bench.report import describe_machine
from posenc.bench.results import Result
from posenc.evaluate.sweep.results import Sweep
from posenc.report.costs import SETUP, cost_tables, title_of, what_is_compared
from posenc.report.curves import CalibrationSummary
from posenc.report.maps import config_of, is_beyond, map_address
from posenc.report.sources import Material
from posenc.report.svg import ChartPoint, line_chart
from posenc.report.tables import (
    DepthTable,
    ScoreTable,
    depth_tables,
    length_head,
    pair_tables,
    ratio_tables,
    score_tables,
)
from posenc.trace import quiet

LOWEST_LOSS, HIGHEST_LOSS = 0.1, 1.0
"""Least and most nats per token above the best candidate that a V-curve shows."""
WIDE = 10
"""Ratio of the largest to the smallest parameter above which the scale of a V-curve is logarithmic."""


@dataclass(frozen=True)
class Grid:
    """A table of text; the columns from ``numbers`` on are right-aligned."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    numbers: int = 1


@dataclass(frozen=True)
class Heat:
    """A depth table that is coloured from 0 to 1."""

    table: DepthTable


@dataclass(frozen=True)
class Chart:
    """SVG text; Markdown shows the numbers only."""

    svg: str


@dataclass(frozen=True)
class Picture:
    """A position map: the address of its image, and a caption."""

    title: str
    address: str
    caption: str


Block = Grid | Heat | Chart | Picture


@dataclass
class Section:
    """A heading, the command that made its numbers, remarks, and blocks."""

    title: str
    command: str
    remarks: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)


def sections(material: Material) -> list[Section]:
    """Every section of a page, in its order."""
    sweeps = [_sweep(path, sweep) for path, sweep in material.sweeps.items()]
    calibrations = [_calibration(path, calibration) for path, calibration in material.calibrations.items()]
    return [*sweeps, *calibrations, *(_bench(path, result) for path, result in material.benches.items())]


def _sweep(path: str, sweep: Sweep) -> Section:
    versions = ", ".join(f"{name} {version}" for name, version in sweep.versions.items())
    window = "" if sweep.window is None else f", window {sweep.window} tokens"
    remarks = [f"Model {sweep.model}{window}; {versions}; read from {path}."]
    if sweep.missing:
        remarks.append(f"{sweep.missing} of {len(sweep.cells)} cells are not measured yet; run the command again.")
    section = Section(sweep.name, sweep.command, remarks)
    for table in score_tables(sweep):
        section.blocks.append(Chart(_chart(table, sweep.window)))
        section.blocks.append(_grid(table, sweep.window))
    for table in ratio_tables(sweep):
        section.remarks.append(_lowest(table))
        section.blocks.append(_grid(table, sweep.window))
    section.blocks += [_grid(table, sweep.window) for table in pair_tables(sweep)]
    section.blocks += [Heat(table) for table in depth_tables(sweep)]
    section.blocks += list(_maps(sweep))
    return section


def _lowest(table: ScoreTable) -> str:
    """Name the strategies with the lowest perplexity and their lengths, in words."""
    lengths_of: dict[str, list[str]] = {}
    for column, length in enumerate(table.lengths):
        scores = {label: row[column] for label, row in table.rows.items()}
        best = [label for label, score in scores.items() if score is not None and score.value == 1 and score.error == 0]
        for label in best:
            lengths_of.setdefault(label, []).append(str(length))
    lists = "; ".join(f"{label} at {', '.join(lengths)} tokens" for label, lengths in lengths_of.items())
    return f"Lowest {table.title.split(':')[0]}: {lists or 'not measured'}. Whether others differ: the table of ratios."


def _chart(table: ScoreTable, window: int | None) -> str:
    series = {
        label: [
            ChartPoint(length, score.value, score.error)
            for length, score in zip(table.lengths, scores, strict=True)
            if score is not None
        ]
        for label, scores in table.rows.items()
    }
    return line_chart(
        series,
        title=table.title,
        x_label="input length (tokens)",
        y_label=table.unit.split(",")[0],
        log_y=table.lower_is_better,
        bounds=None if table.lower_is_better else (0.0, 1.0),
        window=window,
    )


def _grid(table: ScoreTable, window: int | None) -> Grid:
    rows = [
        [label, *("-" if score is None else score.shown for score in scores)] for label, scores in table.rows.items()
    ]
    return Grid(table.title, ["strategy", *(length_head(length, window) for length in table.lengths)], rows)


def _maps(sweep: Sweep) -> Iterator[Picture]:
    """One map per strategy, at the longest length, on one colour scale that ends at the window."""
    longest = max(cell.length for cell in sweep.cells)
    cells = {cell.label: cell for cell in sweep.cells if cell.length == longest}
    with quiet():  # warnings about a strategy were shown when the sweep was planned
        plans = {
            label: config_of(cell.identity["strategy"]).make(sweep.window).plan(longest)
            for label, cell in cells.items()
        }
    for label, plan in plans.items():
        highest = float(plan.window or max(plan.max_relative, 1))
        beyond = ", beyond the window (grey)" if is_beyond(plan) else ""
        caption = f"{longest} tokens, distances seen up to {plan.max_relative:g}{beyond}"
        yield Picture(label, map_address(plan, highest), caption)


def _calibration(path: str, calibration: CalibrationSummary) -> Section:
    remarks = [f"Model {calibration.model}; {calibration.texts}; read from {path}."]
    if calibration.fit:
        remarks.append(calibration.fit)
    section = Section(f"calibration of {calibration.model}", calibration.command, remarks)
    if calibration.curves:
        remarks.append(
            "The charts, which only the HTML page has, show the loss of every candidate, with the standard error of "
            "its paired gap to the best one; a candidate that was dropped early stands at the gap seen until then."
        )
    for curve in calibration.curves:
        points = [point for line in curve.lines.values() for point in line if math.isfinite(point.y)]
        low, high = min(point.y for point in points), max(point.y for point in points)
        left, right = min(point.x for point in points), max(point.x for point in points)
        chart = line_chart(
            curve.lines,
            title=f"{curve.strategy} at {curve.length} tokens",
            x_label=f"{curve.parameter}, {curve.strategy} at {curve.length} tokens",
            y_label="nats per token",
            log_x=0 < WIDE * left < right,
            bounds=(low, low + min(HIGHEST_LOSS, max(LOWEST_LOSS, high - low))),
        )
        section.blocks.append(Chart(chart))
    columns = ["tokens", "strategy", "parameters", "tried", "perplexity where chosen", "perplexity elsewhere"]
    section.blocks.append(Grid("choices, perplexity ± standard error", columns, calibration.choices, 3))
    return section


def _bench(path: str, result: Result) -> Section:
    remarks = [*what_is_compared(result), describe_machine(result.machine), f"Read from {path}."]
    section = Section(title_of(result), result.command, remarks)
    section.blocks += [Grid(title, columns, rows, len(SETUP)) for title, columns, rows in cost_tables(result)]
    return section
