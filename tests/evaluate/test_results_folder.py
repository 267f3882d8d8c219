"""A results folder of another version or another run is refused, and a sweep can be read back, also as a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from posenc.errors import InvalidInputError
from posenc.evaluate.sweep import run
from posenc.evaluate.sweep.executors import Execution
from posenc.evaluate.sweep.folder import ResultsFolder
from posenc.evaluate.sweep.results import Sweep, read_sweep, write_sweep
from posenc.evaluate.sweep.session import Session
from tests.evaluate.sweeps import SMALL, contents, plan


def test_a_folder_of_another_version_is_refused(tmp_path: Path, session: Session):
    planned = plan(tmp_path, SMALL, session)
    run.execute(planned, Execution())
    file = planned.folder.path / "sweep.json"
    file.write_text(file.read_text().replace('"version": 1', '"version": 2', 1))
    before = contents(planned.folder.path)
    with pytest.raises(InvalidInputError, match=r"another version of posenc \(results version 2, this one reads"):
        plan(tmp_path, SMALL, session)
    assert contents(planned.folder.path) == before


def test_a_foreign_folder_and_a_file_are_refused(tmp_path: Path, session: Session):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "holiday.jpg").write_bytes(b"")
    with pytest.raises(InvalidInputError, match="not a results folder"):
        plan(tmp_path, SMALL, session)
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="is a file"):
        plan(tmp_path, SMALL, session, "file")


@pytest.mark.parametrize(
    ("damage", "said"),
    [("", "not JSON"), ("{}", "'format'"), ('{"format": "posenc-eval-cell", "version": 1}', "damaged result")],
)
def test_a_damaged_cell_is_named(damage: str, said: str, tmp_path: Path, session: Session):
    planned = plan(tmp_path, SMALL, session)
    run.execute(planned, Execution())
    file = planned.folder.path / "cells" / f"{planned.cells[0].id}.json"
    file.write_text(damage)
    with pytest.raises(InvalidInputError, match=said) as caught:
        _ = planned.missing
    assert file.name in str(caught.value)


def test_two_runs_never_share_a_folder(tmp_path: Path, session: Session):
    planned = plan(tmp_path, SMALL, session)
    with planned.folder.held(), pytest.raises(InvalidInputError, match="another posenc eval is at work"):
        run.execute(planned, Execution())
    run.execute(planned, Execution())


def test_a_bundle_contains_the_whole_sweep(tmp_path: Path, session: Session):
    sweep = run.execute(plan(tmp_path, SMALL, session), Execution())
    assert sweep.missing == 0
    bundle = write_sweep(sweep, tmp_path / "bundle.json")
    assert read_sweep(bundle) == sweep
    assert "seconds" not in bundle.read_text()
    json.loads(bundle.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_a_sweep_without_results_can_be_read(tmp_path: Path, session: Session):
    planned = plan(tmp_path, SMALL, session)
    with planned.folder.held():
        planned.folder.write_sweep(planned.sweep)
    loaded = planned.folder.load()
    assert isinstance(loaded, Sweep)
    assert loaded.missing == 4
    with pytest.raises(InvalidInputError, match=r"no sweep\.json"):
        ResultsFolder(tmp_path).load()


def test_a_system_without_fcntl_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(InvalidInputError, match=r"no fcntl module \(Windows\)"), ResultsFolder(tmp_path / "out").held():
        pytest.fail("held without a lock")
