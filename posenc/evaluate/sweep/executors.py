"""Who measures the cells: this process, local worker processes, or jobs on a Slurm cluster.

Each writes every measured cell into the results folder itself, so a kill loses only the cells that are being measured.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any, Literal

from pydantic import TypeAdapter

from posenc.errors import InvalidConfigError, PosencError
from posenc.evaluate.sweep.cell import Cell
from posenc.evaluate.sweep.folder import ResultsFolder
from posenc.evaluate.sweep.measure import CellOutcome, measure_into
from posenc.evaluate.sweep.session import Session

POLL = 0.5
"""Seconds between two looks at running jobs."""

CELLS = TypeAdapter(list[Cell])
ExecutorName = Literal["in-process", "processes", "slurm"]
Outcomes = Generator[CellOutcome, None, None]


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

    def measure(self, cells: Sequence[Cell], folder: ResultsFolder, session: Session) -> Outcomes:
        """Measure cells and yield each as it ends. Close the iterator to stop what it started.

        Raises
        ------
        PosencError
            If results cannot be written, or jobs cannot be submitted.
        """
        if self.name == "in-process":
            return (measure_into(folder, session, cell) for cell in cells)
        if self.name == "processes":
            return processes(cells, folder, workers=self.workers)
        return slurm(cells, folder, jobs=self.workers, options=self.slurm)


def processes(cells: Sequence[Cell], folder: ResultsFolder, *, workers: int) -> Outcomes:
    """Measure in worker processes, which end with this one, however it ends.

    Raises
    ------
    PosencError
        If a worker cannot write its results.
    """
    waiting: Queue[Cell] = Queue()
    for cell in cells:
        waiting.put(cell)
    finished: Queue[CellOutcome | PosencError | None] = Queue()
    crew = [_Worker(folder, waiting, finished, share=workers) for _ in range(min(workers, len(cells)))]
    for worker in crew:
        worker.start()
    try:
        at_work = len(crew)
        while at_work:
            outcome = finished.get()
            if outcome is None:
                at_work -= 1
            elif isinstance(outcome, PosencError):
                raise outcome
            else:
                yield outcome
    finally:
        for worker in crew:
            worker.stop()


class _Worker(threading.Thread):
    """Sends cells to one child process, one at a time; starts another when it dies."""

    def __init__(
        self,
        folder: ResultsFolder,
        waiting: Queue[Cell],
        finished: Queue[CellOutcome | PosencError | None],
        *,
        share: int,
    ) -> None:
        super().__init__(daemon=True)
        self._folder, self._waiting, self._finished = folder, waiting, finished
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // share))}
        self._child: subprocess.Popen[str] | None = None
        self._stopped = False

    def run(self) -> None:
        try:
            while not self._stopped:
                try:
                    cell = self._waiting.get_nowait()
                except Empty:
                    return
                self._finished.put(self._measure(cell))
        except PosencError as error:
            self._finished.put(error)
        finally:
            self.stop()
            self._finished.put(None)

    def stop(self) -> None:
        """End the child and start no other; the cell that it is measuring is lost."""
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    def _measure(self, cell: Cell) -> CellOutcome:
        if self._child is None or self._child.poll() is not None:
            command = [sys.executable, "-m", "posenc.evaluate.sweep.worker", str(self._folder.path)]
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
            )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(cell.model_dump_json() + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            line = ""
        else:
            line = self._child.stdout.readline()
        if not line:
            status = self._child.wait()
            return CellOutcome(id=cell.id, error=f"the worker process ended (status {status}), perhaps out of memory")
        outcome = CellOutcome.model_validate_json(line)
        if not outcome.id:
            raise PosencError(outcome.error or "a worker failed")
        return outcome


def slurm(cells: Sequence[Cell], folder: ResultsFolder, *, jobs: int, options: dict[str, Any]) -> Outcomes:
    """Measure in jobs that submitit submits; `options` go to its executor (``cluster="local"`` needs no Slurm).

    Raises
    ------
    PosencError
        If submitit is not installed or refuses the options.
    """
    try:
        import submitit
    except ImportError:
        raise PosencError("--executor slurm needs submitit. Run: pip install 'posenc[slurm]'") from None
    parameters = dict(options)
    try:
        executor = submitit.AutoExecutor(folder=folder.path / "slurm", cluster=parameters.pop("cluster", "slurm"))
        executor.update_parameters(name="posenc-eval", **parameters)
        submitted = [
            executor.submit(measure_all, str(folder.path), CELLS.dump_python(list(cells[start::jobs]), mode="json"))
            for start in range(min(jobs, len(cells)))
        ]
    except (RuntimeError, ValueError, TypeError, NameError) as error:
        raise InvalidConfigError(f"--slurm: submitit refuses this: {' '.join(str(error).split())}") from None
    yield from _follow(submitted, [cell.id for cell in cells], folder)


def measure_all(folder: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What one job does: measure its cells and return their outcomes."""
    session, results = Session(), ResultsFolder(Path(folder))
    return [measure_into(results, session, cell).model_dump() for cell in CELLS.validate_python(cells)]


def _follow(submitted: list[Any], identifiers: list[str], folder: ResultsFolder) -> Outcomes:
    """Yield cells as their files appear, and at the end what the jobs say about the others."""
    missing = set(identifiers)
    try:
        while True:
            ended = all(job.done() for job in submitted)
            for identifier in sorted(missing):
                if folder.done(identifier):
                    missing.remove(identifier)
                    yield CellOutcome(id=identifier)
            if ended or not missing:
                break
            time.sleep(POLL)
    except (KeyboardInterrupt, GeneratorExit):
        for job in submitted:
            job.cancel()
        raise
    outcomes: dict[str, CellOutcome] = {}
    failed_job: CellOutcome | None = None
    for job in submitted:
        problem = job.exception()
        if problem is None:
            outcomes |= {data["id"]: CellOutcome.model_validate(data) for data in job.result()}
        else:
            failed_job = CellOutcome(id="", error=f"job {job.job_id} failed: {str(problem).strip().splitlines()[-1]}")
    for identifier in sorted(missing):
        reason = outcomes.get(identifier) or failed_job
        yield CellOutcome(id=identifier, error=reason.error if reason and reason.error else "no job measured it")
