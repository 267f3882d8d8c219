"""Who measures the cells: this process, local worker processes, or jobs on a Slurm cluster.

All of them write every measured cell into the results folder themselves, so a kill loses what is being
measured and nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter

from posenc.errors import InvalidConfigError, PosencError
from posenc.evaluate.sweep.folder import ResultsFolder
from posenc.evaluate.sweep.session import Cell, Session

POLL = 0.5
"""Seconds between two looks at running jobs."""

CELLS = TypeAdapter(list[Cell])


class Done(BaseModel):
    """A cell that was measured, or the one line that says why not."""

    model_config = ConfigDict(frozen=True)

    id: str
    seconds: float = 0.0
    error: str | None = None


Report = Callable[[Done], None]


def measure_into(folder: ResultsFolder, session: Session, cell: Cell) -> Done:
    """Measure a cell and write it. Whatever goes wrong in it is reported and ends no other cell.

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
        return Done(id=cell.id, error=" ".join(message.split()) or type(error).__name__)
    seconds = time.perf_counter() - began
    folder.write(result, seconds)
    return Done(id=cell.id, seconds=seconds)


def in_process(cells: Iterable[Cell], folder: ResultsFolder, report: Report, *, session: Session) -> None:
    """Measure one cell after the other, here."""
    for cell in cells:
        report(measure_into(folder, session, cell))


def processes(cells: Sequence[Cell], folder: ResultsFolder, report: Report, *, workers: int) -> None:
    """Measure in worker processes, which end with this one, however it ends.

    Raises
    ------
    PosencError
        If a worker cannot write its results.
    """
    waiting: Queue[Cell] = Queue()
    for cell in cells:
        waiting.put(cell)
    finished: Queue[Done | PosencError | None] = Queue()
    crew = [_Worker(folder, waiting, finished, share=workers) for _ in range(min(workers, len(cells)))]
    for worker in crew:
        worker.start()
    try:
        at_work = len(crew)
        while at_work:
            done = finished.get()
            if done is None:
                at_work -= 1
            elif isinstance(done, PosencError):
                raise done
            else:
                report(done)
    finally:
        for worker in crew:
            worker.stop()


class _Worker(threading.Thread):
    """Feeds one child process cell by cell; starts another when it dies."""

    def __init__(
        self, folder: ResultsFolder, waiting: Queue[Cell], finished: Queue[Done | PosencError | None], *, share: int
    ) -> None:
        super().__init__(daemon=True)
        self._folder, self._waiting, self._finished = folder, waiting, finished
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // share))}
        self._child: subprocess.Popen[str] | None = None

    def run(self) -> None:
        try:
            while True:
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
        """End the child; a cell that it is at is lost."""
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    def _measure(self, cell: Cell) -> Done:
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
            return Done(
                id=cell.id, error=f"the worker process ended (status {self._child.wait()}), out of memory perhaps"
            )
        done = Done.model_validate_json(line)
        if not done.id:
            raise PosencError(done.error or "a worker failed")
        return done


def slurm(cells: Sequence[Cell], folder: ResultsFolder, report: Report, *, jobs: int, options: dict[str, Any]) -> None:
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
    given = dict(options)
    try:
        executor = submitit.AutoExecutor(folder=folder.path / "slurm", cluster=given.pop("cluster", "slurm"))
        executor.update_parameters(name="posenc-eval", **given)
        submitted = [
            executor.submit(measure_all, str(folder.path), CELLS.dump_python(list(cells[start::jobs]), mode="json"))
            for start in range(min(jobs, len(cells)))
        ]
    except (RuntimeError, ValueError, TypeError, NameError) as error:
        raise InvalidConfigError(f"--slurm: submitit refuses this: {' '.join(str(error).split())}") from None
    _follow(submitted, [cell.id for cell in cells], folder, report)


def measure_all(folder: str, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What one job does: measure its cells, and say how each went."""
    session, results = Session(), ResultsFolder(Path(folder))
    return [measure_into(results, session, cell).model_dump() for cell in CELLS.validate_python(cells)]


def _follow(submitted: list[Any], identifiers: list[str], folder: ResultsFolder, report: Report) -> None:
    """Report cells as their files appear, and at the end what the jobs say of the others."""
    missing = set(identifiers)
    try:
        while True:
            ended = all(job.done() for job in submitted)
            for identifier in sorted(missing):
                if folder.done(identifier):
                    missing.remove(identifier)
                    report(Done(id=identifier))
            if ended or not missing:
                break
            time.sleep(POLL)
    except KeyboardInterrupt:
        for job in submitted:
            job.cancel()
        raise
    said: dict[str, Done] = {}
    for job in submitted:
        problem = job.exception()
        for done in [] if problem is not None else (Done.model_validate(entry) for entry in job.result()):
            said[done.id] = done
        if problem is not None:
            said[""] = Done(id="", error=f"job {job.job_id} failed: {str(problem).strip().splitlines()[-1]}")
    for identifier in sorted(missing):
        why = said.get(identifier) or said.get("")
        report(Done(id=identifier, error=why.error if why and why.error else "no job measured it"))
