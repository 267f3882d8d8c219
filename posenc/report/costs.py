"""What a benchmark measured, as tables: a row per strategy, a column per length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from posenc.bench.cases import KINDS, kind_shown, what_of
from posenc.bench.results import BenchRow, Result

SETUP = ("strategy", "shape", "dtype", "threads", "backend")
"""The columns by which the rows of a table differ."""


def title_of(result: Result) -> str:
    """The heading of a file, such as ``costs: attention, 9/3x64, 2048 to 16384 tokens``."""
    kinds = dict.fromkeys(row.kind.replace("_", " ") for row in result.rows)
    shapes = dict.fromkeys(row.shape for row in result.rows)
    lengths = _lengths(result.rows)
    span = str(lengths[0]) if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
    return f"costs: {', '.join((*kinds, *shapes))}, {span} tokens"


def what_is_compared(result: Result) -> list[str]:
    """Say for every kind of work what both sides compute."""
    return [
        f"{kind_shown(kind, cache).replace('_', ' ')}: {what_of(kind, cache)}. Plain: {KINDS[kind].baseline}."
        for kind, cache in dict.fromkeys((row.kind, row.cache) for row in result.rows)
        if kind in KINDS
    ]


def cost_tables(result: Result) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows: time for every kind of work, and peak memory if it was measured."""
    tables = []
    for kind, cache in dict.fromkeys((row.kind, row.cache) for row in result.rows):
        rows = [row for row in result.rows if (row.kind, row.cache) == (kind, cache)]
        name = kind_shown(kind, cache).replace("_", " ")
        columns = [*SETUP, *map(str, _lengths(rows))]
        tables.append(
            (f"{name}: time over plain, median of the rounds (lowest .. highest)", columns, _pivot(rows, _time))
        )
        if any(row.memory_ratio is not None for row in rows):
            tables.append((f"{name}: peak memory beyond the inputs, over plain's", columns, _pivot(rows, _memory)))
    return tables


def _pivot(rows: Sequence[BenchRow], cell: Callable[[BenchRow], str]) -> list[list[str]]:
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for row in rows:
        setup = tuple(str(getattr(row, key)) for key in SETUP)
        cells.setdefault(setup, {})[row.length] = cell(row)
    return [[*setup, *(by_length.get(at, "-") for at in _lengths(rows))] for setup, by_length in cells.items()]


def _time(row: BenchRow) -> str:
    return f"{row.ratio:.2f} ({min(row.ratios):.2f} .. {max(row.ratios):.2f})"


def _memory(row: BenchRow) -> str:
    return "-" if row.memory_ratio is None else f"{row.memory_ratio:.2f}"


def _lengths(rows: Sequence[BenchRow]) -> list[int]:
    return sorted({row.length for row in rows})
