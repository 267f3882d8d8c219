"""A results folder: ``sweep.json``, ``cells/ID.json`` and ``timings.jsonl``. A kill at any moment damages no file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from posenc.errors import InvalidInputError
from posenc.evaluate.cells import CellStore, clear_drafts
from posenc.evaluate.sweep.results import CellResult, Sweep, SweepEntry, read_cell, read_sweep, write_sweep
from posenc.evaluate.tasks.base import Sample
from posenc.files import make_folder

SWEEP, CELLS, TIMINGS, FAILED, LOCK = "sweep.json", "cells", "timings.jsonl", "failed", ".lock"


class ResultsFolder:
    """The folder of one sweep. Every file of a cell is whole, whichever process writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._cells = CellStore(path / CELLS, read_cell)

    def check(self) -> None:
        """Check that the folder is new, empty, or holds a sweep.

        Raises
        ------
        InvalidInputError
            If another version or something else wrote it, or the path is a file.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise InvalidInputError(f"{self.path}: is a file. Give a folder for the results with --out.")
        if (self.path / SWEEP).exists():
            read_sweep(self.path / SWEEP)
        elif any(entry.name != CELLS and not entry.name.startswith(".") for entry in self.path.iterdir()):
            raise InvalidInputError(
                f"{self.path}: holds files, but no {SWEEP}: not a results folder. Give a new or empty folder."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and keep other runs of posenc eval out of it inside the block.

        Raises
        ------
        InvalidInputError
            If another run is at work in it, or it cannot be written.
        """
        self.check()
        make_folder(self._cells.folder)
        try:
            lock = (self.path / LOCK).open("w")
        except OSError as error:
            raise InvalidInputError(f"{self.path}: cannot be written ({error.strerror or error}).") from None
        with lock:
            self._lock(lock)
            clear_drafts(self.path)
            self._cells.clear_drafts()
            yield

    def _lock(self, file: IO[str]) -> None:
        """Lock an open file until it is closed."""
        try:
            import fcntl
        except ImportError:
            raise InvalidInputError(
                f"{self.path}: cannot be locked against other runs, because Python on this system has no fcntl module "
                "(Windows). Run posenc eval on Linux or macOS."
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInputError(
                f"{self.path}: another posenc eval is at work here. Wait for it, or choose another folder."
            ) from None

    def write_sweep(self, sweep: Sweep) -> None:
        """Write the sweep file, which lists the cells."""
        write_sweep(sweep, self.path / SWEEP)

    def done(self, identifier: str) -> bool:
        """True if the cell is measured; raises as :meth:`read` does."""
        return self.read(identifier) is not None

    def read(self, identifier: str) -> tuple[Sample, ...] | None:
        """The samples of a cell, or None if it is not measured yet.

        Raises
        ------
        InvalidInputError
            If the file is damaged, or holds another cell.
        """
        result = self._cells.read(identifier)
        if result is None:
            return None
        if result.id != identifier:
            raise InvalidInputError(f"{self._cells.file(identifier)}: holds another cell. Remove it and measure again.")
        return result.samples

    def write(self, result: CellResult, seconds: float) -> None:
        """Write a measured cell, and log how long it took."""
        self._cells.write(result.id, result.model_dump_json(indent=1, exclude_none=True) + "\n")
        with suppress(OSError), (self.path / TIMINGS).open("a", encoding="utf-8") as log:
            log.write(json.dumps({"id": result.id, "seconds": round(seconds, 3)}) + "\n")
        with suppress(OSError):
            self._failure(result.id).unlink(missing_ok=True)

    def write_failure(self, identifier: str, trace: str) -> None:
        """Write the traceback of a cell that could not be measured."""
        file = self._failure(identifier)
        with suppress(OSError):
            file.parent.mkdir(exist_ok=True)
            file.write_text(trace, encoding="utf-8")

    def timings(self) -> dict[str, float]:
        """Seconds per measured cell, for those that were logged."""
        seconds: dict[str, float] = {}
        with suppress(OSError):
            for line in (self.path / TIMINGS).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, KeyError, TypeError):  # the last line of a killed run may be cut
                    entry = json.loads(line)
                    seconds[entry["id"]] = float(entry["seconds"])
        return seconds

    def load(self) -> Sweep:
        """The sweep with the samples of every measured cell.

        Raises
        ------
        InvalidInputError
            If the folder holds no sweep, or one of its files is damaged.
        """
        if not (self.path / SWEEP).is_file():
            raise InvalidInputError(f"{self.path}: no {SWEEP} here. Make one with posenc eval --out {self.path}.")
        sweep = read_sweep(self.path / SWEEP)
        return sweep.model_copy(update={"cells": tuple(self._filled(entry) for entry in sweep.cells)})

    def _filled(self, entry: SweepEntry) -> SweepEntry:
        return entry.model_copy(update={"samples": self.read(entry.id)})

    def _failure(self, identifier: str) -> Path:
        return self.path / FAILED / f"{identifier}.txt"
