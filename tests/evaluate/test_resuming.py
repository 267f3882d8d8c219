"""A sweep survives every kill, full disk and failing cell, and ends with the same bytes."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from posenc.errors import InvalidInputError, PosencError
from posenc.evaluate.sweep import run
from posenc.evaluate.sweep.executors import Execution
from posenc.evaluate.sweep.session import Session
from tests.evaluate.sweeps import SMALL, contents, plan

TWENTY: dict[str, Any] = {
    "name": "twenty",
    "lengths": [32, 40],
    "seeds": [0, 1],
    "strategies": [
        "rope",
        {"label": "lampe", "strategy": {"name": "lampe", "mapping": 12, "head": 4, "tail": 2}},
        {"strategy": {"name": "rerope", "window_size": 12}},
        {"strategy": {"name": "self_extend", "group": 4, "window_size": 8}},
        {"strategy": {"name": "yarn", "factor": 2}},
    ],
    "tasks": [{"task": "perplexity", "documents": 2, "scored": 8}],
}
KILLS = 20


def test_twenty_kills_at_random_moments_lose_nothing(tmp_path: Path, session: Session):
    whole = plan(tmp_path, TWENTY, session, "whole")
    assert len(whole.cells) == 20
    began = time.perf_counter()
    run.execute(whole, Execution())
    per_cell = (time.perf_counter() - began) / 20
    expected = contents(tmp_path / "whole")
    assert len(expected) == 21

    dice, interrupted, rounds = random.Random(0), 0, 0
    for _ in range(KILLS):
        planned = plan(tmp_path, TWENTY, session, f"killed-{rounds}")
        before = len(planned.missing)
        child = os.fork()
        if child == 0:  # a copy of this process, in the middle of a sweep
            try:
                run.execute(planned, Execution())
            finally:
                os._exit(0)
        time.sleep(dice.uniform(0, 2 * per_cell))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        interrupted += os.WIFSIGNALED(status)
        left = len(planned.missing)  # reads every existing cell: none is half written
        assert left <= before
        rounds += left == 0
    assert interrupted >= KILLS * 3 // 4
    for number in range(rounds + 1):
        run.execute(plan(tmp_path, TWENTY, session, f"killed-{number}"), Execution())
        assert contents(tmp_path / f"killed-{number}") == expected


@pytest.mark.parametrize("write_number", range(5))
def test_a_kill_in_the_middle_of_a_write_loses_only_that_write(write_number: int, tmp_path: Path, session: Session):
    planned = plan(tmp_path, SMALL, session)
    child = os.fork()
    if child == 0:
        count = iter(range(100))
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL) if next(count) == write_number else None
        run.execute(planned, Execution())
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert len(planned.missing) == 4 - max(0, write_number - 1)
    run.execute(plan(tmp_path, SMALL, session), Execution())
    whole = plan(tmp_path, SMALL, session, "whole")
    run.execute(whole, Execution())
    assert contents(planned.folder.path) == contents(whole.folder.path)


def test_only_missing_cells_are_measured(tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch):
    planned = plan(tmp_path, SMALL, session)
    run.execute(planned, Execution())
    before = contents(planned.folder.path)
    (planned.folder.path / "cells" / f"{planned.cells[2].id}.json").unlink()
    measured = []
    real = Session.measure

    def measure(self: Session, cell: Any) -> Any:
        measured.append(cell.id)
        return real(self, cell)

    monkeypatch.setattr(Session, "measure", measure)
    run.execute(plan(tmp_path, SMALL, session), Execution())
    assert measured == [planned.cells[2].id]
    assert contents(planned.folder.path) == before


def test_adding_lengths_later_keeps_existing_cells(tmp_path: Path, session: Session):
    task = {"task": "perplexity", "documents": 2, "scored": 8, "longest": 64}
    run.execute(plan(tmp_path, SMALL, session, tasks=[task]), Execution())
    longer = plan(tmp_path, SMALL, session, tasks=[task], lengths=[24, 40, 64])
    assert [cell.length for cell in longer.missing] == [64, 64]


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path, session: Session):
    planned = plan(tmp_path, SMALL, session)
    run.execute(planned, Execution())
    draft = planned.folder.path / "cells" / ".abc-x7.json"
    draft.write_text('{"half')
    run.execute(plan(tmp_path, SMALL, session), Execution())
    assert not draft.exists()


def test_a_full_disk_ends_the_sweep_and_keeps_finished_cells(
    tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch
):
    planned = plan(tmp_path, SMALL, session)
    count = iter(range(100))

    def full(handle: int) -> None:
        if next(count) >= 3:  # the sweep file and two cells
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidInputError, match="cannot be written \\(No space left on device\\)"):
        run.execute(planned, Execution())
    monkeypatch.undo()
    assert len(planned.missing) == 2
    assert not list((planned.folder.path / "cells").glob(".*"))
    run.execute(planned, Execution())
    assert not planned.missing


def test_a_failing_cell_does_not_stop_the_others(tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch):
    planned = plan(tmp_path, SMALL, session)
    bad = planned.cells[1].id
    real = Session.measure

    def measure(self: Session, cell: Any) -> Any:
        if cell.id == bad:
            raise RuntimeError("out of memory, say")
        return real(self, cell)

    monkeypatch.setattr(Session, "measure", measure)
    seen: list[int] = []
    with pytest.raises(
        PosencError, match=f"1 of 4 cells could not be measured(.|\n)*rope, perplexity, 40 tokens \\({bad}\\)"
    ):
        run.execute(planned, Execution(), lambda description, tokens: seen.append(tokens))
    assert len(seen) == 4
    assert "out of memory, say" in (planned.folder.path / "failed" / f"{bad}.txt").read_text()
    monkeypatch.undo()
    assert [cell.id for cell in planned.missing] == [bad]
    run.execute(planned, Execution())
    assert not (planned.folder.path / "failed" / f"{bad}.txt").exists()
