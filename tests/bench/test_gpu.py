"""``make gpu`` without a GPU: its steps on the CPU, its clocks by stand-ins, and its section of the page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from posenc.bench import cuda, results, timing
from posenc.bench.cases import Case, Settings
from posenc.bench.goals import GPU_TARGETS, TARGETS
from posenc.bench.report import describe_machine, page
from posenc.bench.run import run, run_until
from scripts import gpu
from tests.bench.conftest import result, row

TINY = Settings(strategies=("rerope",), lengths=(64, 128), heads=("2/1x8",), rounds=3)


def gpu_row(**changes: Any) -> results.Row:
    """A row of triton on a GPU: ratio 1.25 at 32k tokens, where the goal is 1.10."""
    facts = {
        "shape": "32/8x128",
        "dtype": "bfloat16",
        "length": 32768,
        "backend": "triton",
        "device": "cuda",
        "clock": "events",
    }
    return row(**{**facts, **changes})


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give ``make gpu`` another test suite to run, and a folder of its own."""

    def choose(source: str) -> None:
        file = tmp_path / "test_made_up.py"
        file.write_text(source)
        monkeypatch.setattr(gpu, "TESTS", (str(file),))
        monkeypatch.setattr(gpu, "ROOT", tmp_path)

    return choose


def test_all_steps_on_the_cpu(suite, tmp_path: Path, capsys):
    suite(
        "import os, pytest\n"
        "@pytest.mark.parametrize('name', ['cpu_flash', 'reference', 'triton'])\n"
        "def test_one(name):\n    assert os.environ['POSENC_TEST_DEVICE'] == 'cpu' and name != 'reference'\n"
    )
    out = tmp_path / "results"
    assert gpu.main(["--device", "cpu", "--smoke", "--out", str(out)]) == 1  # the reference fails its test
    (file,) = out.glob("*.json")
    written = results.read(file)
    assert {(r.kind, r.backend, r.length) for r in written.rows} == {
        (kind, backend, length)
        for kind in ("attention", "query")
        for backend in ("cpu_flash", "reference")
        for length in (64, 128)
    }
    assert [(c.backend, c.passed, c.failed, c.good) for c in written.checks] == [
        ("cpu_flash", 1, 0, True),
        ("reference", 0, 1, False),
    ]
    assert written.left_out == ()
    text = (out / "performance.md").read_text()
    assert "- `reference`: 0 passed, 1 failed, 0 not declared" in text
    assert "No GPU has been measured yet" in text  # a CPU is none
    assert str(tmp_path) not in file.read_text()
    assert "cpu_flash: 1 passed" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_writes_nothing(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu: no CUDA GPU here")
    assert not (tmp_path / "new").exists()


def test_tests_that_do_not_end_are_stopped(suite):
    suite("import time\ndef test_one():\n    time.sleep(600)\n")
    (check,) = gpu.check(("cpu_flash",), "cpu", seconds=0.0)
    assert not check.good
    assert "stopped after 0 s" in str(check.problem)


def test_a_backend_without_tests_is_not_good(suite):
    suite("def test_one():\n    pass\n")
    (check,) = gpu.check(("cpu_flash",), "cpu", seconds=60.0)  # its name is in no test
    assert not check.good


def test_what_cannot_run_is_named():
    found, reasons = gpu.usable(("cpu_flash", "xformers", "no_such_kernel"), "cpu")
    assert found == ("cpu_flash",)
    assert reasons == [
        "xformers: it runs on cuda, not on cpu",
        "no_such_kernel: no backend of that name is registered",
    ]


def test_every_goal_is_measured():
    cases = [case for part in gpu.parts(gpu.TIMED, smoke=False) for case in part.cases()]
    assert len(cases) == len(set(cases))
    measured = {(c.kind, c.shape, c.length, c.strategy, c.backend, c.dtype, c.device) for c in cases}
    for target in GPU_TARGETS:
        for goal in target.goals:
            for strategy in target.strategies:
                asked = (goal.kind, goal.shape, goal.length, strategy, goal.gpu_backend, "bfloat16", "cuda")
                assert asked in measured
    assert {c.length for c in cases if c.kind == "attention"} == {2**n for n in range(12, 18)}
    assert {c.length for c in cases if c.kind == "query"} == {2**n for n in range(13, 18)}


def test_no_case_starts_when_time_is_up():
    rows, left_out, facts = run_until([TINY], time.monotonic() - 1, lambda case: None)
    assert rows == []
    assert left_out == [f"{case}: no time was left" for case in TINY.cases()]
    assert {"load_after", "other_cores"} <= set(facts)


def test_a_case_that_fails_costs_itself_alone(monkeypatch):
    from posenc.bench import attention

    real = attention.build

    def build(case: Case) -> timing.Pair:
        if case.length == 64:
            raise RuntimeError("out of memory\nwith a long tail")
        return real(case)

    monkeypatch.setattr(attention, "build", build)
    rows, left_out, _ = run_until([TINY], time.monotonic() + 600, lambda case: None)
    assert [row.length for row in rows] == [128]
    assert left_out == [f"{TINY.cases()[0]}: RuntimeError: out of memory"]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose tensors are on the CPU and whose clocks are the wall's."""
    from dataclasses import replace

    from posenc.bench import attention

    real = attention.build
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "build", lambda case: real(replace(case, device="cpu")))
    monkeypatch.setattr(cuda, "events", timing.wall)
    monkeypatch.setattr(cuda, "record", lambda call: call)
    monkeypatch.setattr(cuda, "peak_bytes", lambda call: 1 if call() is None else 2**20)
    monkeypatch.setattr(
        cuda, "describe", lambda: {"gpu": "Made-Up GPU 80GB", "driver": "580.1", "versions": {"triton": "3.6.0"}}
    )


@pytest.mark.usefixtures("pretend")
def test_a_run_on_a_gpu(monkeypatch):
    settings = Settings(
        kinds=("attention", "query"), strategies=("rerope",), lengths=(64,), heads=("2/1x8",), device="cuda", rounds=3
    )
    said: list[str] = []
    found = run(settings, said.append)
    assert [(r.kind, r.device, r.clock) for r in found.rows] == [
        ("attention", "cuda", "events"),
        ("query", "cuda", "graph"),
    ]
    assert all(r.memory is not None and r.memory.plain == 2**20 for r in found.rows)
    assert said == [str(case) for case in settings.cases()]
    assert found.command.endswith("--device cuda")
    assert found.file_name == "attention-query-2-1x8-64-float32-made-up-gpu-80gb.json"
    assert describe_machine(found.machine).startswith("Made-Up GPU 80GB, driver 580.1; ")
    assert found.machine.versions["triton"] == "3.6.0"

    def refuse(call: object) -> None:
        raise RuntimeError("cannot be captured")

    monkeypatch.setattr(cuda, "record", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert run(settings, said.append).rows[1].clock == "events"


def test_the_page_holds_gpu_rows_to_gpu_goals():
    text = page({"a.json": result(gpu_row())})
    assert "No GPU has been measured yet" not in text
    assert "| 32/8x128 | 32768 | ≤ 1.10 | 1.25 **missed** [1] |" in text
    assert "timed by CUDA events." in text
    cpu = sum(len(target.goals) * len(target.strategies) for target in TARGETS)
    assert f"**0 met, 0 missed, {cpu} not measured.**" in text  # none of them is a goal of the CPU
    assert "1.05 met [1]" in page({"a.json": result(gpu_row(remapped=(0.21, 0.21, 0.21)))})


def test_a_gpu_goal_holds_for_its_backend_and_dtype_only():
    goal = GPU_TARGETS[0].goals[0]
    assert goal.applies(gpu_row())
    for change in ({"backend": "xformers"}, {"dtype": "float16"}, {"device": "cpu"}, {"kind": "query"}):
        assert not goal.applies(gpu_row(**change)), change
    assert not any(goal.applies(gpu_row()) for target in TARGETS for goal in target.goals)


def test_times_of_wrong_results_do_not_count():
    wrong = {"backend": "triton", "passed": 9, "failed": 1, "skipped": 0}
    found = json.loads(result(gpu_row(remapped=(0.2, 0.2, 0.2))).model_dump_json())
    found |= {"checks": [wrong], "left_out": ["xformers: not installed"]}
    text = page({"a.json": results.Result.model_validate(found)})
    assert "1.00 **fails its tests** [1]" in text
    assert "**0 met, 1 missed" in text
    assert "- `triton`: 9 passed, 1 failed" in text
    assert "- xformers: not installed" in text


def test_files_from_before_gpus_are_still_read():
    old = json.loads(result().model_dump_json())
    for item in ("checks", "left_out"):
        del old[item]
    for item in ("device", "clock"):
        del old["rows"][0][item]
    for item in ("gpu", "driver"):
        del old["machine"][item]
    assert results.Result.model_validate_json(json.dumps(old)) == result()
