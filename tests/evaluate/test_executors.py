"""Every executor writes the same bytes, and a worker that dies costs only its cell."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posenc.evaluate.sweep import executors, run
from posenc.evaluate.sweep.executors import Execution
from posenc.evaluate.sweep.measure import CellOutcome
from posenc.evaluate.sweep.session import Session
from tests.evaluate.sweeps import SMALL, contents, plan


def test_workers_load_the_model_as_the_suite_says(tmp_path: Path):
    half = {"name": "tiny", "dtype": "bfloat16", "device": "cpu"}
    found = [
        run.execute(plan(tmp_path, SMALL, Session(), out=out, model=model), Execution("processes", workers=1))
        for out, model in (("whole", "tiny"), ("half", half))
    ]
    scores = [[sample.score for cell in sweep.cells for sample in cell.samples] for sweep in found]
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


@pytest.mark.parametrize("execution", [Execution("processes", 2), Execution("slurm", 1, {"cluster": "local"})], ids=str)
def test_every_executor_writes_the_same_bytes(execution: Execution, tmp_path: Path, session: Session):
    here = plan(tmp_path, SMALL, session, "here")
    run.execute(here, Execution())
    there = plan(tmp_path, SMALL, session, "there")
    seen: list[int] = []
    run.execute(there, execution, lambda description, tokens: seen.append(tokens))
    assert contents(there.folder.path) == contents(here.folder.path)
    assert sorted(seen) == [2 * 24, 2 * 24, 2 * 40, 2 * 40]


def test_a_worker_that_dies_costs_only_its_cell(tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch):
    planned = plan(tmp_path, SMALL, session)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    outcomes: list[CellOutcome] = list(executors.processes(planned.cells, planned.folder, workers=1))
    assert len(outcomes) == 4
    assert all("worker process ended (status 1)" in (outcome.error or "") for outcome in outcomes)


def test_workers_stop_when_nobody_waits_for_their_cells(
    tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch
):
    planned = plan(tmp_path, SMALL, session)
    children: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def record(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
        children.append(start(*arguments, **options))
        return children[-1]

    monkeypatch.setattr(subprocess, "Popen", record)
    with planned.folder.held():
        outcomes = executors.processes(planned.cells, planned.folder, workers=1)
        assert next(outcomes).error is None
        outcomes.close()
    assert all(child.poll() is not None for child in children)
    assert 1 <= 4 - len(planned.missing) < 4


def test_a_worker_ends_when_its_input_ends(tmp_path: Path):
    (tmp_path / "cells").mkdir()
    command = [sys.executable, "-m", "posenc.evaluate.sweep.worker", str(tmp_path)]
    ran = subprocess.run(command, input="", capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "")
