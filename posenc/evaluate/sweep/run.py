"""Run a sweep from where it is: plan the cells, measure those that are missing, say which could not be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from posenc.errors import PosencError
from posenc.evaluate.sweep import executors
from posenc.evaluate.sweep.executors import Done
from posenc.evaluate.sweep.folder import ResultsFolder
from posenc.evaluate.sweep.results import Entry, Sweep
from posenc.evaluate.sweep.session import Cell, Session
from posenc.evaluate.sweep.suite import Suite, make_cells, read_suite
from posenc.evaluate.tasks.read import read_task
from posenc.trace import versions

ExecutorName = Literal["in-process", "processes", "slurm"]


@dataclass(frozen=True)
class Planned:
    """A suite, its cells, and where their results go."""

    suite: Suite
    cells: list[Cell]
    session: Session
    folder: ResultsFolder
    command: str

    @property
    def missing(self) -> list[Cell]:
        """Cells that are not measured yet; of equal ones the first."""
        different = {cell.id: cell for cell in reversed(self.cells)}
        return [cell for cell in self.cells if different[cell.id] is cell and not self.folder.done(cell.id)]

    @property
    def sweep(self) -> Sweep:
        """The sweep file, without samples."""
        return Sweep(
            name=self.suite.name,
            command=self.command,
            model=self.suite.model.name,
            window=self.session.loaded(self.suite.model).window,
            versions=versions(),
            cells=tuple(_entry(cell) for cell in self.cells),
        )


@dataclass(frozen=True)
class Execution:
    """Who measures.

    Parameters
    ----------
    name : str
        ``"in-process"``, ``"processes"`` or ``"slurm"``.
    workers : int
        Processes or jobs.
    slurm : dict
        Options for submitit.
    """

    name: ExecutorName = "in-process"
    workers: int = 2
    slurm: dict[str, Any] = field(default_factory=dict)

    def __call__(self, planned: Planned, cells: Sequence[Cell], report: executors.Report) -> None:
        """Measure cells."""
        if self.name == "in-process":
            executors.in_process(cells, planned.folder, report, session=planned.session)
        elif self.name == "processes":
            executors.processes(cells, planned.folder, report, workers=self.workers)
        else:
            executors.slurm(cells, planned.folder, report, jobs=self.workers, options=self.slurm)


def plan(path: str | Path, out: Path | None = None, session: Session | None = None) -> Planned:
    """Read a suite and find its cells; ``out`` is ``out/eval/NAME`` by default.

    Raises
    ------
    PosencError
        If the suite is wrong or the folder belongs to something else; nothing is written.
    """
    suite = read_suite(path)
    folder = ResultsFolder(out or Path("out") / "eval" / suite.name)
    folder.check()
    session = session or Session()
    return Planned(suite, make_cells(suite, session, source=str(path)), session, folder, f"posenc eval {path}")


def execute(planned: Planned, execution: Execution, step: Callable[[str, int], None] | None = None) -> Sweep:
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
    named = {cell.id: f"{cell.label}, {cell.task['task']}, {cell.length} tokens" for cell in planned.cells}
    tokens = {cell.id: cell.tokens for cell in planned.cells}
    failed: list[Done] = []

    def report(done: Done) -> None:
        if done.error is not None:
            failed.append(done)
        if step is not None:
            step(named[done.id], tokens[done.id])

    with planned.folder.held():
        planned.folder.write_sweep(planned.sweep)
        execution(planned, planned.missing, report)
        sweep = planned.folder.load()
    if failed:
        lines = "\n".join(f"  {named[done.id]} ({done.id}): {done.error}" for done in failed[:10])
        more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
        raise PosencError(
            f"{len(failed)} of {len(planned.cells)} cells could not be measured; the others are in "
            f"{planned.folder.path}. Run the same command to try them again; tracebacks are in "
            f"{planned.folder.path / 'failed'}.\n{lines}{more}"
        )
    return sweep


def _entry(cell: Cell) -> Entry:
    task = read_task(cell.task, source=cell.label)
    return Entry(
        id=cell.id,
        label=cell.label,
        task=task.title,
        metric=task.metric,
        length=cell.length,
        seed=cell.seed,
        identity=cell.identity,
        against=cell.against,
    )
