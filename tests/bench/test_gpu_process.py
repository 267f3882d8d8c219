"""The parent continues when worker processes, or steps of a plan, crash, hang or raise."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from posenc.bench import lines
from scripts.gpu_plan import Plan, Step
from scripts.gpu_process import Died, Worker

HERE = "tests.bench.stand_ins"


def test_a_worker_continues_after_a_crash_a_hang_and_an_exception(tmp_path: Path):
    with Worker(tmp_path / "worker.log") as worker:
        assert worker.ask(f"{HERE}:doubled", 60, number=21) == 42
        first = worker.process.pid
        with pytest.raises(Died, match=r"^ValueError: no such case$"):
            worker.ask(f"{HERE}:failing", 60)
        assert worker.ask(f"{HERE}:doubled", 60, number=4) == 8
        assert worker.process.pid == first  # an exception does not end the process
        with pytest.raises(Died, match=r"^the process ended \(SIGABRT\): the last words"):
            worker.ask(f"{HERE}:crashing", 60)
        assert not worker.alive
        with pytest.raises(Died, match=r"^stopped after 0 s$"):
            worker.ask(f"{HERE}:hanging", 0.3)
        assert worker.ask(f"{HERE}:doubled", 60, number=1) == 2
    assert not worker.alive


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(tmp_path / "out", tmp_path / "work", smoke=True, seconds=100)


def step(plan: Plan, how: str, name: str, seconds: float = 60) -> Step:
    return Step(how, (HERE, how, str(plan.folder / name)), seconds)


def test_a_plan_continues_after_steps_that_fail_or_hang(plan: Plan, capsys):
    assert not plan.step(step(plan, "badly", "gpu.jsonl"))
    assert not plan.step(step(plan, "never", "sweep.jsonl", seconds=2))
    assert plan.step(step(plan, "well", "canary.jsonl"))
    plan.finish()
    assert [verdict for _, verdict, _ in plan.verdicts] == ["exit status 1", "stopped after 2 s", "ok"]
    kept = {file.name: file.read_text() for file in plan.out.iterdir()}
    assert {name: kept[name] for name in ("gpu.jsonl", "sweep.jsonl", "canary.jsonl")} == {
        "gpu.jsonl": "badly",
        "sweep.jsonl": "never",
        "canary.jsonl": "well",
    }
    assert "== never (stopped after 2 s)\nends never" in kept["log.txt"]
    *_, first, second, third, files, _table = capsys.readouterr().out.splitlines()
    assert [first[:7], second[:7], third[:6]] == ["badly: ", "never: ", "well: "]
    assert "log.txt" in files


def test_files_are_copied_while_a_step_runs(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("scripts.gpu_plan.COPY_EVERY", 0.0)
    real = plan.copy

    def copy(every: float = 0.0) -> None:
        real(every)
        seen.append((plan.out / "gpu.jsonl").exists())

    monkeypatch.setattr(plan, "copy", copy)
    plan.step(step(plan, "never", "gpu.jsonl", seconds=2))
    assert any(seen[:-1])  # before the copy that follows the step


def test_no_step_begins_after_the_end_of_the_plan(plan: Plan):
    plan.ends = time.monotonic() + 0.5
    assert not plan.step(step(plan, "well", "gpu.jsonl"))
    assert plan.verdicts == [("well", "no time was left", 0.0)]


def test_at_most_eight_files_are_kept(plan: Plan):
    for name in ("a.log", "step-7.txt", *plan_files()):
        (plan.folder / name).write_text("x")
    (plan.folder / "results").mkdir()
    (plan.folder / "results" / "attention.json").write_text("x")
    plan.copy()
    assert {file.name for file in plan.out.iterdir()} == {"attention.json", *plan_files()}
    assert len(list(plan.out.iterdir())) <= 8


def plan_files() -> tuple[str, ...]:
    from scripts.gpu_plan import KEPT

    return KEPT


def test_an_incomplete_line_is_ignored(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    assert lines.read(file) == []
    lines.append(file, {"a": 1})
    lines.append(file, {"b": 2})
    with file.open("a") as handle:
        handle.write('{"c": ')
    assert lines.read(file) == [{"a": 1}, {"b": 2}]
