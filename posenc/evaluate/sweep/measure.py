"""Measure one cell into a results folder, as every executor does."""

from __future__ import annotations

import time
import traceback

from pydantic import BaseModel, ConfigDict

from posenc.errors import PosencError
from posenc.evaluate.sweep.cell import Cell
from posenc.evaluate.sweep.folder import ResultsFolder
from posenc.evaluate.sweep.session import Session


class CellOutcome(BaseModel):
    """A cell that was measured, or the reason in one line why it could not be."""

    model_config = ConfigDict(frozen=True)

    id: str
    seconds: float = 0.0
    error: str | None = None


def measure_into(folder: ResultsFolder, session: Session, cell: Cell) -> CellOutcome:
    """Measure a cell and write it. An error is reported and does not stop other cells.

    Raises
    ------
    InvalidInputError
        If the result cannot be written: then no other cell's can be, either.
    """
    began = time.perf_counter()
    try:
        result = session.measure(cell)
    except Exception as error:
        folder.write_failure(cell.id, traceback.format_exc())
        message = str(error) if isinstance(error, PosencError) else f"{type(error).__name__}: {error}"
        return CellOutcome(id=cell.id, error=" ".join(message.split()) or type(error).__name__)
    seconds = time.perf_counter() - began
    folder.write(result, seconds)
    return CellOutcome(id=cell.id, seconds=seconds)
