"""Run a sweep from where it is: plan its cells, measure those that are missing, and report those that failed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from posenc.errors import PosencError
from posenc.evaluate.sweep.cell import Cell
from posenc.evaluate.sweep.executors import Execution
from posenc.evaluate.sweep.folder import FAILED, ResultsFolder
from posenc.evaluate.sweep.measure import CellOutcome
from posenc.evaluate.sweep.results import Sweep
from posenc.evaluate.sweep.session import Session
from posenc.evaluate.sweep.suite import Suite, make_cells, read_suite
from posenc.trace import versions

SHOWN = 10
"""Failed cells that the error names."""


@dataclass(frozen=True)
class PlannedSweep:
    """A suite, its cells, and the folder of their results."""

    suite: Suite
    cells: list[Cell]
    session: Session
    folder: ResultsFolder
    command: str

    @property
    def missing(self) -> list[Cell]:
        """Cells that are not measured yet; of equal ones the first."""
        firsts = {cell.id: cell for cell in reversed(self.cells)}
        return [cell for cell in self.cells if firsts[cell.id] is cell and not self.folder.done(cell.id)]

    @property
    def sweep(self) -> Sweep:
        """The sweep file, without samples."""
        return Sweep(
            name=self.suite.name,
            command=self.command,
            model=self.suite.model.name,
            window=self.session.loaded(self.suite.model).window,
            versions=versions(),
            cells=tuple(cell.entry for cell in self.cells),
        )


def plan(path: str | Path, out: Path | None = None, session: Session | None = None) -> PlannedSweep:
    """Read a suite and make its cells; ``out`` is ``out/eval/NAME`` by default.

    Raises
    ------
    PosencError
        If the suite is wrong or the folder belongs to something else; nothing is written.
    """
    suite = read_suite(path)
    folder = ResultsFolder(out or Path("out") / "eval" / suite.name)
    folder.check()
    session = session or Session()
    return PlannedSweep(suite, make_cells(suite, session, source=str(path)), session, folder, f"posenc eval {path}")


def execute(
    planned: PlannedSweep, execution: Execution, step: Callable[[str, int], None] = lambda description, tokens: None
) -> Sweep:
    """Measure what is missing and return everything that was measured.

    Parameters
    ----------
    step : callable, optional
        Called after every cell with a description and the cell's tokens.

    Raises
    ------
    PosencError
        If a cell could not be measured, after all others were; or if results cannot be written.
    """
    cells = {cell.id: cell for cell in planned.cells}
    failed: list[CellOutcome] = []
    with planned.folder.held():
        planned.folder.write_sweep(planned.sweep)
        with closing(execution.measure(planned.missing, planned.folder, planned.session)) as outcomes:
            for outcome in outcomes:
                if outcome.error is not None:
                    failed.append(outcome)
                step(cells[outcome.id].title, cells[outcome.id].tokens)
        sweep = planned.folder.load()
    if failed:
        lines = "\n".join(f"  {cells[cell.id].title} ({cell.id}): {cell.error}" for cell in failed[:SHOWN])
        more = f"\n  and {len(failed) - SHOWN} more" if len(failed) > SHOWN else ""
        raise PosencError(
            f"{len(failed)} of {len(planned.cells)} cells could not be measured; the others are in "
            f"{planned.folder.path}. Run the same command to try them again; tracebacks are in "
            f"{planned.folder.path / FAILED}.\n{lines}{more}"
        )
    return sweep
