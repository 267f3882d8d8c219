"""Numbers with their errors, from the samples of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from posenc.evaluate.perplexity import Mean, PerplexityScore
from posenc.evaluate.sweep.results import Sweep, SweepEntry
from posenc.evaluate.tasks.base import over_documents


@dataclass(frozen=True)
class ScoreWithError:
    """A number, its standard error over documents (NaN for a single one), and the number of documents."""

    value: float
    error: float
    documents: int

    @property
    def shown(self) -> str:
        """``12.34 ± 0.56``, or ``1.002 ± 0.003``."""
        return with_error(self.value, self.error)


@dataclass(frozen=True)
class ScoreTable:
    """One task of a sweep: a row per strategy, a column per length; None for a cell that is not measured.

    Parameters
    ----------
    title, unit : str
    lengths : tuple of int
        In tokens.
    rows : dict of str to tuple
        By the strategy's label.
    lower_is_better : bool
    """

    title: str
    unit: str
    lengths: tuple[int, ...]
    rows: dict[str, tuple[ScoreWithError | None, ...]]
    lower_is_better: bool


@dataclass(frozen=True)
class DepthTable:
    """The score of one strategy by depth and length: a row per depth, a column per length."""

    label: str
    task: str
    lengths: tuple[int, ...]
    rows: dict[float, tuple[ScoreWithError | None, ...]]


def with_error(value: float, error: float) -> str:
    """A number and its standard error with two decimals, or three if the error is below 0.01."""
    if not math.isfinite(value):
        return "-"
    decimals = 3 if 0 < error < 0.01 else 2
    text = f"{value:.{decimals}f}"
    return f"{text} ± {error:.{decimals}f}" if math.isfinite(error) else text


def length_head(length: int, window: int | None) -> str:
    """``1024 (4x)``: a length in tokens, and how many windows it is."""
    return f"{length} ({length / window:g}x)" if window else str(length)


def tasks_of(sweep: Sweep) -> list[str]:
    """The names of the tasks of a sweep, in its order."""
    return list(dict.fromkeys(cell.task for cell in sweep.cells))


def score_tables(sweep: Sweep) -> list[ScoreTable]:
    """One table per task: perplexity for losses, otherwise the share that is right."""
    tables = []
    for task in tasks_of(sweep):
        cells = [cell for cell in sweep.cells if cell.task == task]
        loss = cells[0].metric == "loss"
        lengths = tuple(sorted({cell.length for cell in cells}))
        means = _means(cells)
        rows = {
            label: tuple(_score(means.get((label, length)), loss=loss) for length in lengths)
            for label in _labels(cells)
        }
        counts = _span(score.documents for scores in rows.values() for score in scores if score is not None)
        unit = "perplexity, lower is better" if loss else "share right, higher is better"
        tables.append(ScoreTable(f"{task}: {unit}, {counts} documents, ± standard error", unit, lengths, rows, loss))
    return tables


def ratio_tables(sweep: Sweep) -> list[ScoreTable]:
    """Perplexity over the lowest one at the same length, with the error of the paired difference.

    Documents are the same for every strategy, so differences have far smaller errors than the values.
    """
    tables = []
    for task in tasks_of(sweep):
        cells = [cell for cell in sweep.cells if cell.task == task and cell.metric == "loss"]
        lengths = tuple(sorted({cell.length for cell in cells}))
        means = _means(cells)
        rows: dict[str, list[ScoreWithError | None]] = {label: [] for label in _labels(cells)}
        for length in lengths:
            at = {label: means[label, length] for label in rows if (label, length) in means}
            finite = {label: mean for label, mean in at.items() if math.isfinite(mean.mean)}
            best = min(finite, key=lambda label: finite[label].mean) if finite else None
            for label, scores in rows.items():
                paired = best is not None and label in at and len(at[label].values) == len(at[best].values)
                scores.append(_ratio(at[label].minus(at[best])) if best is not None and paired else None)
        if rows:
            unit = "times the lowest perplexity at that length"
            title = f"{task}: {unit}, ± standard error of the paired difference"
            tables.append(
                ScoreTable(title, unit, lengths, {label: tuple(scores) for label, scores in rows.items()}, True)
            )
    return tables


def pair_tables(sweep: Sweep) -> list[ScoreTable]:
    """Each strategy against the one that its suite compares it with, and the error of the paired difference.

    Losses are compared as the ratio of the perplexities, accuracies as their difference.
    """
    tables = []
    for task in tasks_of(sweep):
        cells = [cell for cell in sweep.cells if cell.task == task]
        pairs = {cell.label: cell.against for cell in cells if cell.against is not None}
        loss = cells[0].metric == "loss"
        lengths = tuple(sorted({cell.length for cell in cells}))
        means = _means(cells)
        rows = {
            f"{label}, against {against}": tuple(
                _compared(means.get((label, length)), means.get((against, length)), loss=loss) for length in lengths
            )
            for label, against in pairs.items()
        }
        if rows:
            unit = "perplexity of the first over that of the second" if loss else "share right, first minus second"
            title = f"{task}: {unit}, ± standard error of the paired difference"
            tables.append(ScoreTable(title, unit, lengths, rows, loss))
    return tables


def depth_tables(sweep: Sweep) -> list[DepthTable]:
    """One table per strategy, for every task that hides something."""
    tables = []
    for task in tasks_of(sweep):
        cells = [cell for cell in sweep.cells if cell.task == task]
        depths = sorted({s.depth for cell in cells for s in cell.samples or () if s.depth is not None})
        lengths = tuple(sorted({cell.length for cell in cells}))
        for label in _labels(cells) if depths else ():
            labelled = [cell for cell in cells if cell.label == label]
            rows = {}
            for depth in depths:
                means = _means(labelled, depth)
                rows[depth] = tuple(_score(means.get((label, length)), loss=False) for length in lengths)
            tables.append(DepthTable(label, task, lengths, rows))
    return tables


def _means(cells: Sequence[SweepEntry], depth: float | None = None) -> dict[tuple[str, int], Mean]:
    """Per strategy and length one value per document, for all seeds."""
    values: dict[tuple[str, int], list[float]] = {}
    for cell in sorted(cells, key=lambda cell: cell.seed):
        samples = [s for s in cell.samples or () if depth is None or s.depth == depth]
        if samples:
            values.setdefault((cell.label, cell.length), []).extend(over_documents(samples).values)
    return {key: Mean(tuple(scores)) for key, scores in values.items()}


def _score(mean: Mean | None, *, loss: bool) -> ScoreWithError | None:
    if mean is None:
        return None
    if loss:
        perplexity = PerplexityScore(mean)
        return ScoreWithError(perplexity.value, perplexity.standard_error, len(mean.values))
    return ScoreWithError(mean.mean, mean.standard_error, len(mean.values))


def _compared(mean: Mean | None, other: Mean | None, *, loss: bool) -> ScoreWithError | None:
    if mean is None or other is None or len(mean.values) != len(other.values):
        return None
    difference = mean.minus(other)
    return _ratio(difference) if loss else _score(difference, loss=False)


def _ratio(difference: Mean) -> ScoreWithError:
    ratio = PerplexityScore(difference)
    return ScoreWithError(ratio.value, ratio.standard_error, len(difference.values))


def _labels(cells: Sequence[SweepEntry]) -> list[str]:
    return list(dict.fromkeys(cell.label for cell in cells))


def _span(counts: Iterable[int]) -> str:
    distinct = sorted(set(counts))
    if len(distinct) > 1:
        return f"{distinct[0]} to {distinct[-1]}"
    return str(distinct[0]) if distinct else "0"
