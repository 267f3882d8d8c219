"""The table at the end of a run on a GPU: every strategy, length and backend, short enough for the end of a log."""

from __future__ import annotations

from collections.abc import Sequence

from posenc.bench.cases import CUDNN, FLASH, kind_shown
from posenc.bench.goals import GPU_TARGETS, Goal
from posenc.bench.results import BenchRow

SETUP = ("kind", "shape", "strategy", "backend")
MET, MISSED, NO_GOAL = "+", "-", " "
TITLE = f"time over flash attention alone ({MET} goal met, {MISSED} missed); cudnn: cuDNN's, at the longest length"


def table(rows: Sequence[BenchRow]) -> str:
    """Format the rows as plain text: a line per setup, a column per length."""
    lengths = sorted({row.length for row in rows})
    setups: dict[tuple[str, ...], dict[int, BenchRow]] = {}
    for row in rows:
        setups.setdefault((kind_shown(row.kind, row.cache), row.shape, row.strategy, row.backend), {})[row.length] = row
    lines = [[*SETUP, *map(_tokens, lengths), "goal", "cudnn"]]
    for setup, by_length in setups.items():
        cells = [_cell(by_length[length]) if length in by_length else "" for length in lengths]
        lines.append([*setup, *cells, _limit(by_length), _cudnn(by_length[max(by_length)])])
    return "\n".join([TITLE, *_aligned(lines)])


def _aligned(lines: list[list[str]]) -> list[str]:
    """Columns of equal width: the setup to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = len(SETUP)
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def ratio(row: BenchRow) -> float:
    """Time over flash attention alone, or over plain if that was not measured."""
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
    """Time of cuDNN's attention alone over that of torch's flash attention alone."""
    over_cudnn, over_flash = row.over(CUDNN), row.over(FLASH)
    return "" if over_cudnn is None or over_flash is None else f"{over_flash / over_cudnn:.2f}"


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
