"""The one table that a run on a GPU ends with: every strategy, length and backend, small enough for a log's tail."""

from __future__ import annotations

from collections.abc import Sequence

from posenc.bench.cases import CUDNN, FLASH, kind_shown
from posenc.bench.goals import GPU_TARGETS, Goal
from posenc.bench.results import BenchRow

SETUP = ("kind", "shape", "strategy", "backend")
MET, MISSED, NO_GOAL = "+", "-", " "
TITLE = f"time over flash attention alone ({MET} goal met, {MISSED} missed); cuDNN's own at the longest measured"


def table(rows: Sequence[BenchRow]) -> str:
    """A line per case but for its length, a column per length; plain text."""
    lengths = sorted({row.length for row in rows})
    lines: dict[tuple[str, ...], dict[int, BenchRow]] = {}
    for row in rows:
        setup = (kind_shown(row.kind, row.cache), row.shape, row.strategy, row.backend)
        lines.setdefault(setup, {})[row.length] = row
    body: list[list[str]] = [[*SETUP, *map(_tokens, lengths), "goal", "cudnn"]]
    for about, by_length in lines.items():
        longest = by_length[max(by_length)]
        cells = [_cell(by_length[length]) if length in by_length else "" for length in lengths]
        body.append([*about, *cells, _limit(by_length), _cudnn(longest)])
    widths = [max(len(line[column]) for line in body) for column in range(len(body[0]))]
    count = len(SETUP)
    shown = [
        "  ".join(
            cell.ljust(width) if column < count else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in body
    ]
    return "\n".join([TITLE, *shown])


def ratio(row: BenchRow) -> float:
    """Over flash attention alone, or over plain where that was not measured."""
    return row.over(FLASH) or row.ratio


def _cell(row: BenchRow) -> str:
    marks = [MET if goal.met(value) else MISSED for goal, value in _goals(row)]
    mark = NO_GOAL if not marks else MISSED if MISSED in marks else MET
    return f"{ratio(row):.2f}{mark}"


def _goals(row: BenchRow) -> list[tuple[Goal, float]]:
    goals = (goal for target in GPU_TARGETS for goal in target.goals if goal.applies(row))
    return [(goal, value) for goal in goals if (value := goal.value(row)) is not None]


def _limit(by_length: dict[int, BenchRow]) -> str:
    limits = {f"{goal.limit:.2f}" for row in by_length.values() for goal, _ in _goals(row) if goal.measure == "alone"}
    return "/".join(sorted(limits))


def _cudnn(row: BenchRow) -> str:
    """cuDNN's attention alone over torch's flash attention alone."""
    over_cudnn, over_flash = row.over(CUDNN), row.over(FLASH)
    return "" if over_cudnn is None or over_flash is None else f"{over_flash / over_cudnn:.2f}"


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
