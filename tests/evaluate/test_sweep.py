"""The cells of a sweep have their own ids, survive every kill, and are the same however they were measured."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from posenc.calibration.file import read
from posenc.calibration.file import write as write_calibration
from posenc.config import read_config
from posenc.errors import InvalidConfigError, InvalidInputError, PosencError
from posenc.evaluate.models import ModelSpec
from posenc.evaluate.sweep import executors, run
from posenc.evaluate.sweep.executors import Execution
from posenc.evaluate.sweep.folder import ResultsFolder
from posenc.evaluate.sweep.measure import CellOutcome
from posenc.evaluate.sweep.results import Sweep, read_sweep, write_sweep
from posenc.evaluate.sweep.run import PlannedSweep
from posenc.evaluate.sweep.session import Session
from posenc.evaluate.sweep.suite import make_cells, read_suite
from posenc.evaluate.tasks.read import read_task

SMALL: dict[str, Any] = {
    "name": "small",
    "lengths": [24, 40],
    "strategies": ["rope", {"strategy": {"name": "rerope", "window_size": 12}}],
    "tasks": [{"task": "perplexity", "documents": 2, "scored": 8}],
}
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
ROOT = Path(__file__).parents[2]
SECOND = ROOT / "benchmarks/tiny-qwen3.yaml"
"""A calibration file; the others are suites."""
BENCHMARKS = sorted(set((ROOT / "benchmarks").glob("*.yaml")) - {SECOND})
TINY = ModelSpec(name="tiny")


@pytest.fixture(scope="module")
def session() -> Session:
    """One session for the whole file, so that the model is loaded once."""
    return Session()


def write(folder: Path, suite: dict[str, Any], **changes: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**suite, **changes}), encoding="utf-8")
    return path


def plan(folder: Path, suite: dict[str, Any], session: Session, out: str = "out", **changes: Any) -> PlannedSweep:
    return run.plan(write(folder, suite, **changes), folder / out, session)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that belongs to a result."""
    files = [folder / "sweep.json", *(folder / "cells").iterdir()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


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


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": [24, 41]},
        {"seeds": [1]},
        {"strategies": ["rope", {"strategy": {"name": "rerope", "window_size": 13}}]},
        {"strategies": ["rope", {"strategy": {"name": "rerope", "window_size": 12}, "frequencies": "ntk"}]},
        {"strategies": ["rope", {"strategy": {"name": "rerope", "window_size": 12}, "backend": "reference"}]},
        {"tasks": [{"task": "perplexity", "documents": 3, "scored": 8}]},
        {"model": {"name": "tiny", "dtype": "bfloat16"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_everything_that_determines_a_result_is_in_the_id(changes: dict[str, Any], tmp_path: Path, session: Session):
    before, after = (plan(tmp_path, SMALL, session, **given).cells[-1].id for given in ({}, changes))
    assert before != after


def test_neither_a_label_nor_a_spelled_out_default_changes_the_id(tmp_path: Path, session: Session):
    ids = [
        plan(tmp_path, SMALL, session, strategies=[chosen]).cells[0].id
        for chosen in ("yarn", {"label": "mine", "strategy": {"name": "yarn", "factor": 4}})
    ]
    assert ids[0] == ids[1]


def test_the_device_is_not_in_the_id(tmp_path: Path, session: Session):
    ids = [
        plan(tmp_path, SMALL, session, model=model).cells[0].id for model in ("tiny", {"name": "tiny", "device": "cpu"})
    ]
    assert ids[0] == ids[1]


def test_workers_load_the_model_as_the_suite_says(tmp_path: Path):
    half = {"name": "tiny", "dtype": "bfloat16", "device": "cpu"}
    found = [
        run.execute(plan(tmp_path, SMALL, Session(), out=out, model=model), Execution("processes", workers=1))
        for out, model in (("whole", "tiny"), ("half", half))
    ]
    scores = [[sample.score for cell in sweep.cells for sample in cell.samples] for sweep in found]
    assert scores[0] != scores[1]
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


def test_the_content_of_a_text_is_in_the_id_and_its_name_is_not(tmp_path: Path):
    ids = []
    for name, words in (("a.txt", "one two "), ("a.txt", "one three "), ("b.txt", "one two ")):
        (tmp_path / name).write_text(words * 200)
        task = {"task": "perplexity", "documents": 2, "scored": 8, "text": str(tmp_path / name)}
        ids.append(plan(tmp_path, SMALL, Session(), tasks=[task]).cells[0].id)
    assert ids[0] == ids[2] != ids[1]


def test_the_model_and_the_tokenizer_are_in_the_id(tmp_path: Path, session: Session):
    import torch

    before = session.cell("a", TINY, *_one(tmp_path, session))
    with torch.no_grad():
        weight = session.loaded(TINY).model.model.layers[0].self_attn.q_proj.weight
        kept = weight.clone()
        weight[0, 0] += 1
        other = Session(loader=lambda which: session.loaded(TINY))
        changed = other.cell("a", TINY, *_one(tmp_path, other))
        weight.copy_(kept)
    assert before.id != changed.id
    with pytest.raises(InvalidInputError, match="model changed since"):
        session.measure(changed)


def _one(folder: Path, session: Session) -> tuple[Any, ...]:
    task = read_task({"task": "perplexity", "documents": 1, "scored": 4, "longest": 24}, source="t")
    return read_config({"strategy": "rope"}), task, 24, 0


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


def test_a_worker_ends_when_its_input_ends(tmp_path: Path):
    (tmp_path / "cells").mkdir()
    command = [sys.executable, "-m", "posenc.evaluate.sweep.worker", str(tmp_path)]
    ran = subprocess.run(command, input="", capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "")


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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lengths": []}, "lengths"),
        ({"lengths": ["4y"]}, "multiple such as 4x"),
        ({"lengths": [0]}, "multiple such as 4x"),
        ({"lengths": [4]}, "rope, perplexity, 4 tokens: length 4"),
        ({"lengths": [10_000_000]}, "10000000 tokens: .*too short"),
        ({"length": [40]}, "length: no such key. Known keys: name, model"),
        ({"strategies": ["lmpe"]}, "Did you mean 'lampe'"),
        ({"strategies": ["rope", "rope"]}, "the label 'rope' comes twice"),
        ({"strategies": ["rope", {"label": "b", "strategy": "rope"}]}, "b, perplexity, 24 tokens is the same as rope"),
        ({"strategies": [{"strategy": {"name": "rerope", "window": -3}}]}, "window"),
        ({"strategies": [{"strategy": {"name": "rerope", "widow_size": 3}}]}, "widow_size"),
        ({"strategies": [{"label": 3, "strategy": "rope"}]}, r"strategies\[0\].label"),
        ({"strategies": [{"calibrated": "rerope"}]}, "needs the suite's key 'calibration'"),
        ({"strategies": [{"calibrated": "rerope"}], "calibration": "missing.yaml"}, "missing.yaml"),
        ({"strategies": [{"transferred_from": "a.yaml", "strategy": "rope"}]}, "belongs to 'calibrated: NAME'"),
        ({"strategies": [{"calibrated": "rerope", "transferred_from": 3}]}, r"transferred_from: must be a text"),
        ({"strategies": ["rope", {"strategy": "dca", "against": "rop"}]}, r"'rop', which is no label.* are: rope\."),
        ({"strategies": [{"strategy": "dca", "against": "dca"}]}, "which is no label of another strategy"),
        ({"tasks": ["perplexiti"]}, r"tasks\[0\]: no task named"),
        ({"tasks": [{"task": "perplexity", "text": "nowhere.txt"}]}, "nowhere.txt: cannot be read"),
        ({"name": "a/b"}, "name"),
        ({"model": "no/such"}, "cannot load"),
        ({"model": 5}, "model: expected a model's name, or a mapping with the keys name, dtype, device"),
        ({"model": {"name": "tiny", "devise": "cpu"}}, "mapping with the keys name, dtype, device"),
        ({"model": {"name": "tiny", "dtype": "int8"}}, r"model\.dtype: Input should be 'float32'"),
        ({"model": {"name": "tiny", "device": "cuda:99"}}, "device 'cuda:99': torch cannot use it here"),
    ],
    ids=str,
)
def test_a_wrong_suite_is_refused_before_anything_is_measured(
    changes: dict[str, Any], said: str, tmp_path: Path, session: Session
):
    path = write(tmp_path, SMALL, **changes)
    fresh = Session() if "model" in changes else session
    with pytest.raises(PosencError, match=said):
        make_cells(read_suite(path), fresh, source=str(path))


@pytest.mark.parametrize("file", BENCHMARKS, ids=lambda file: file.name)
def test_the_suites_of_the_results_are_readable(file: Path, tmp_path: Path):
    suite = read_suite(file)
    assert suite.name == file.stem
    assert suite.lengths_for(256)
    tasks = [read_task(task, source=file.name) for task in suite.tasks]
    assert tasks
    for entry in suite.strategies:
        if isinstance(entry, dict) and ("calibrated" in entry or "profiles" in str(entry)):
            continue  # made by posenc calibrate
        entry = {"strategy": entry} if isinstance(entry, str) else entry
        given = {key: value for key, value in entry.items() if key not in ("label", "against")}
        read_config(given, source=file.name).make(8192).plan(9000)


def test_lengths_are_tokens_or_windows(tmp_path: Path):
    suite = read_suite(write(tmp_path, SMALL, lengths=["2x", 24, "0.5x", "1x"]))
    assert suite.lengths_for(256) == [24, 128, 256, 512]
    with pytest.raises(InvalidConfigError, match="needs the model's window"):
        suite.lengths_for(None)


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
