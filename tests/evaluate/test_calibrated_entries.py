"""A suite takes parameters from calibration files: the model's own, or another model's if it says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from posenc.calibration.file import read
from posenc.calibration.file import write as write_calibration
from posenc.errors import InvalidConfigError, PosencError
from posenc.evaluate.sweep import run
from posenc.evaluate.sweep.executors import Execution
from posenc.evaluate.sweep.results import read_sweep, write_sweep
from posenc.evaluate.sweep.session import Session
from tests.evaluate.sweeps import ROOT, SMALL, plan


def calibrate(file: Path, windows: dict[int, int], *, weights: str | None = None) -> str:
    """The calibration of the shipped model with these windows of ``rerope`` by length, or as if for other weights."""
    found = read(ROOT / "posenc/profiles/tiny.yaml")
    model, (choice, *_) = found.model, found.strategies["rerope"].values()
    if weights is not None:
        model = model.model_copy(update={"fingerprint": model.fingerprint.model_copy(update={"weights": weights})})
    by_length = {at: choice.model_copy(update={"params": {"window_size": own}}) for at, own in windows.items()}
    changes = {"model": model, "strategies": {"rerope": by_length}}
    return str(write_calibration(found.model_copy(update=changes), file))


def test_calibrated_parameters_follow_the_length(tmp_path: Path, session: Session):
    calibration = calibrate(tmp_path / "calibration.yaml", {32: 8, 64: 16})
    planned = plan(
        tmp_path,
        SMALL,
        session,
        lengths=[24, 40, 100],
        strategies=[{"calibrated": "rerope"}],
        calibration=calibration,
    )
    assert [cell.identity["strategy"]["window_size"] for cell in planned.cells] == [8, 16, 16]
    with pytest.raises(InvalidConfigError, match=r"has no 'dca'\. It has: rerope"):
        plan(tmp_path, SMALL, session, strategies=[{"calibrated": "dca"}], calibration=calibration)


def test_parameters_of_another_model_are_used_only_if_the_suite_says_so(tmp_path: Path, session: Session):
    own = calibrate(tmp_path / "own.yaml", {24: 8, 48: 16})
    other = calibrate(tmp_path / "other.yaml", {24: 8, 48: 12}, weights="0" * 32)
    transferred = {"calibrated": "rerope", "transferred_from": other, "label": "other", "against": "rerope"}
    with pytest.raises(InvalidConfigError, match=r"another model.* weights.*say 'transferred_from: .*other.yaml'"):
        plan(tmp_path, SMALL, session, strategies=[{"calibrated": "rerope"}], calibration=other)
    with pytest.raises(InvalidConfigError, match="was measured on this very model"):
        plan(tmp_path, SMALL, session, strategies=[{**transferred, "transferred_from": own}])
    with pytest.raises(PosencError, match="another model"):
        plan(tmp_path, SMALL, session, strategies=[{"strategy": {"name": "lampe", "mapping": other}}])

    planned = plan(
        tmp_path, SMALL, session, lengths=[24, 48], strategies=[{"calibrated": "rerope"}, transferred], calibration=own
    )
    windows = {(cell.label, cell.length): cell.identity["strategy"]["window_size"] for cell in planned.cells}
    assert windows == {("rerope", 24): 8, ("rerope", 48): 16, ("other", 24): 8, ("other", 48): 12}
    assert len({cell.id for cell in planned.missing}) == len(planned.missing)  # equal ones are measured once
    sweep = run.execute(planned, Execution())
    assert sweep.missing == 0
    samples = {(cell.label, cell.length): cell.samples for cell in sweep.cells}
    assert samples["other", 24] == samples["rerope", 24]
    assert {cell.label: cell.against for cell in sweep.cells} == {"rerope": None, "other": "rerope"}
    assert read_sweep(write_sweep(sweep, tmp_path / "bundle.json")) == sweep
