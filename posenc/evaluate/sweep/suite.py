"""The suite file: strategies, lengths, tasks and seeds, and the cells that they make.

.. code-block:: yaml

    name: first-look
    model: tiny                      # or {name: owner/model, dtype: bfloat16, device: cuda}
    lengths: [1x, 2x, 1024]          # tokens, or multiples of the model's window
    seeds: [0, 1]
    strategies:
      - strategy: rope
      - {label: lampe 128, strategy: {name: lampe, mapping: 128}}
      - {label: lampe 96, strategy: {name: lampe, mapping: 96}, against: lampe 128}
      - {calibrated: self_extend}    # parameters by length, from the calibration file
    calibration: tiny.yaml
    tasks:
      - perplexity
      - {task: spans, documents: 8}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeInt, ValidationError

from posenc.errors import InvalidConfigError, InvalidInputError, PosencError
from posenc.evaluate.models import ModelSpec
from posenc.evaluate.sweep.cell import Cell
from posenc.evaluate.sweep.entries import StrategyEntry
from posenc.evaluate.sweep.session import Session
from posenc.evaluate.tasks import read_task
from posenc.files import read_yaml
from posenc.params import StrictModel, explain_validation

_MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)x")


class Suite(StrictModel):
    """The content of a suite file; see the module for an example."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: ModelSpec = ModelSpec()
    lengths: tuple[int | str, ...] = Field(min_length=1)
    seeds: tuple[NonNegativeInt, ...] = Field((0,), min_length=1)
    strategies: tuple[Any, ...] = Field(min_length=1)
    calibration: str | None = None
    tasks: tuple[Any, ...] = Field(min_length=1)

    def lengths_for(self, window: int | None) -> list[int]:
        """The lengths in tokens, shortest first.

        Raises
        ------
        InvalidConfigError
            If a length is neither a positive number nor a multiple such as ``4x``, or the window is unknown.
        """
        return sorted({_tokens(length, window) for length in self.lengths})


def read_suite(path: str | Path) -> Suite:
    """Read a suite file.

    Raises
    ------
    InvalidConfigError
        Names the file and the key path of every problem.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise InvalidConfigError(f"{path}: expected a mapping with name, lengths, strategies and tasks.")
    try:
        return Suite.model_validate(data)
    except ValidationError as error:
        message = explain_validation(error, path="", known=list(Suite.model_fields))
        raise InvalidConfigError(f"{path}: {message}") from None


def make_cells(suite: Suite, session: Session, *, source: str) -> list[Cell]:
    """Every cell of a suite, in an order that mixes short and long ones.

    Raises
    ------
    PosencError
        If a strategy, task or length is wrong; the message begins with `source`. Every cell is checked before the first
        one is measured.
    """
    window = session.loaded(suite.model).window
    lengths = suite.lengths_for(window)
    tasks = [read_task(task, source=f"{source}: tasks[{at}]").fitted(lengths) for at, task in enumerate(suite.tasks)]
    fingerprint = session.fingerprint(suite.model)
    entries = [
        StrategyEntry(entry, suite.calibration, fingerprint, f"{source}: strategies[{at}]")
        for at, entry in enumerate(suite.strategies)
    ]
    _check_labels([entry.label for entry in entries], f"{source}: strategies")
    _check_against(entries, f"{source}: strategies")
    cells = []
    for seed in suite.seeds:
        for entry in entries:
            for task in tasks:
                for length in lengths:
                    try:
                        cell = session.cell(entry.label, suite.model, entry.config(length), task, length, seed)
                    except PosencError as error:
                        where = f"{source}: {entry.label}, {task.name}, {length} tokens"
                        raise InvalidInputError(f"{where}: {error}") from None
                    cells.append(cell.model_copy(update={"against": entry.against}))
    _check_different(cells, {entry.label for entry in entries if entry.transferred}, source)
    return cells


def _tokens(length: int | str, window: int | None) -> int:
    if isinstance(length, int) and not isinstance(length, bool) and length > 0:
        return length
    multiple = _MULTIPLE.fullmatch(length) if isinstance(length, str) else None
    if multiple is None or float(multiple[1]) <= 0:
        raise InvalidConfigError(f"lengths: expected a number of tokens or a multiple such as 4x, got {length!r}.")
    if window is None:
        raise InvalidConfigError(
            f"lengths: {length} needs the model's window, which its configuration does not tell. Give tokens."
        )
    return max(1, int(float(multiple[1]) * window))


def _check_against(entries: list[StrategyEntry], where: str) -> None:
    """Check that every ``against`` is the label of another strategy."""
    for entry in entries:
        others = [other.label for other in entries if other is not entry]
        if entry.against is not None and entry.against not in others:
            raise InvalidConfigError(
                f"{where}: {entry.label!r} is against {entry.against!r}, which is no label of another strategy here. "
                f"There are: {', '.join(others)}."
            )


def _check_different(cells: list[Cell], transferred: set[str], source: str) -> None:
    """Refuse two names for one cell, except that parameters of another model may be equal to the model's own."""
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.id, cell)
        if other is not cell and (other.label == cell.label or not transferred & {other.label, cell.label}):
            raise InvalidConfigError(f"{source}: {cell.title} is the same as {other.title}. Remove one of them.")


def _check_labels(labels: list[str], where: str) -> None:
    """Check that no label comes twice."""
    for label in labels:
        if labels.count(label) > 1:
            raise InvalidConfigError(f"{where}: the label {label!r} comes twice. Give each a 'label' of its own.")
