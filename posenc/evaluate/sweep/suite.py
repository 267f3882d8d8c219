"""The suite file: which strategies, lengths, tasks and seeds, and the cells they make.

.. code-block:: yaml

    name: first-look
    model: tiny
    lengths: [1x, 2x, 1024]          # tokens, or multiples of the model's window
    seeds: [0, 1]
    strategies:
      - strategy: rope
      - {label: lampe 128, strategy: {name: lampe, mapping: 128}}
      - {calibrated: self_extend}    # parameters by length, out of the calibration file
    calibration: tiny.yaml
    tasks:
      - perplexity
      - {task: spans, documents: 8}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from posenc.config import Config, read_config, read_yaml
from posenc.errors import InvalidConfigError, InvalidInputError, PosencError
from posenc.evaluate.models import TINY
from posenc.evaluate.sweep.session import Cell, Session
from posenc.evaluate.tasks import read_task
from posenc.positions import explain_validation

_MULTIPLE = re.compile(r"(\d+(?:\.\d+)?)x")


class Suite(BaseModel):
    """A suite file as it stands; see the module for an example."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: str = TINY
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
            If one is neither a positive number nor a multiple such as ``4x``, or the window is not known.
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
        If a strategy, task or length is wrong; the message begins with `source`. Nothing is measured before
        every cell is known to be possible.
    """
    window = session.loaded(suite.model).window
    lengths = suite.lengths_for(window)
    tasks = [read_task(task, source=f"{source}: tasks[{at}]").fitted(lengths) for at, task in enumerate(suite.tasks)]
    chosen = [_Chosen(entry, suite, f"{source}: strategies[{at}]") for at, entry in enumerate(suite.strategies)]
    _distinct([one.label for one in chosen], f"{source}: strategies", "label")
    cells = []
    for seed in suite.seeds:
        for one in chosen:
            for task in tasks:
                for length in lengths:
                    try:
                        cells.append(session.cell(one.label, suite.model, one.config(length), task, length, seed))
                    except PosencError as error:
                        where = f"{source}: {one.label}, {task.kind}, {length} tokens"
                        raise InvalidInputError(f"{where}: {error}") from None
    names = {cell.id: f"{cell.label}, {cell.task['task']}, {cell.length} tokens" for cell in reversed(cells)}
    for cell in cells:
        name = f"{cell.label}, {cell.task['task']}, {cell.length} tokens"
        if names[cell.id] != name:
            raise InvalidConfigError(f"{source}: {name} is the same as {names[cell.id]}. Remove one of them.")
    _distinct([cell.id for cell in cells], source, "cell")
    return cells


class _Chosen:
    """One entry of ``strategies``: a configuration, or a calibrated one that depends on the length."""

    def __init__(self, entry: Any, suite: Suite, where: str) -> None:
        if not isinstance(entry, dict):
            entry = {"strategy": entry}
        given = {key: value for key, value in entry.items() if key not in ("label", "calibrated")}
        self._by_length: dict[int, dict[str, Any]] | None = None
        if "calibrated" in entry:
            if suite.calibration is None:
                raise InvalidConfigError(f"{where}: 'calibrated' needs the suite's key 'calibration', a file.")
            if "strategy" in given:
                raise InvalidConfigError(f"{where}: give either 'strategy' or 'calibrated'.")
            self._by_length = _calibrated(suite.calibration, entry["calibrated"], where)
            given["strategy"] = {"name": entry["calibrated"]}
        self._given, self._where = given, where
        name = entry.get("label")
        if name is not None and (not isinstance(name, str) or not name.strip()):
            raise InvalidConfigError(f"{where}.label: must be a text, got {name!r}.")
        self.label = name or read_config(given, source=where).label

    def config(self, length: int) -> Config:
        """The configuration for inputs of a length."""
        given = self._given
        if self._by_length is not None:
            reached = [at for at in self._by_length if at >= length]
            params = self._by_length[min(reached) if reached else max(self._by_length)]
            given = {**given, "strategy": {**given["strategy"], **params}}
        return read_config(given, source=self._where)


def _calibrated(file: str, name: Any, where: str) -> dict[int, dict[str, Any]]:
    """Parameters by length that ``posenc calibrate`` chose for a strategy."""
    data = read_yaml(file)
    strategies = data.get("strategies") if isinstance(data, dict) else None
    if not isinstance(strategies, dict):
        raise InvalidConfigError(f"{where}: {file} is not a calibration file. Make one with 'posenc calibrate'.")
    if name not in strategies:
        raise InvalidConfigError(f"{where}: {file} has no {name!r}. It has: {', '.join(map(str, strategies))}.")
    try:
        return {int(length): dict(choice["params"]) for length, choice in strategies[name].items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InvalidConfigError(f"{where}: {file} is damaged at strategies.{name}.") from None


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


def _distinct(names: list[str], where: str, what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InvalidConfigError(f"{where}: the {what} {name!r} comes twice. Give each a 'label' of its own.")
