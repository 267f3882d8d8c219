"""``make gpu`` without a GPU: its steps on the CPU, its clocks as stand-ins, and its section of the page."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from posenc.bench import collect, cuda, results, timing
from posenc.bench.goals import GPU_TARGETS, TARGETS
from posenc.bench.report import describe_machine, page
from posenc.bench.run import run
from posenc.bench.settings import BenchSettings
from posenc.errors import InvalidInputError
from scripts import gpu, gpu_canary, gpu_tests, gpu_timing
from scripts.gpu_process import Died
from tests.bench.conftest import result, row


def gpu_row(**changes: Any) -> results.BenchRow:
    """Return a row of triton on a GPU: 0.88 of flash attention alone at 32k tokens, where the goal is 0.80."""
    facts = {
        "shape": "32/8x128",
        "dtype": "bfloat16",
        "length": 32768,
        "backend": "triton",
        "device": "cuda",
        "clock": "events",
        "baselines": {"flash": (0.3, 0.3, 0.3), "cudnn": (0.25, 0.25, 0.25)},
        "remapped": (0.26, 0.264, 0.27),
    }
    return row(**{**facts, **changes})


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give ``make gpu`` another test suite to run."""

    def choose(source: str) -> None:
        file = tmp_path / "test_made_up.py"
        file.write_text(source)
        monkeypatch.setattr(gpu_tests, "TESTS", (str(file),))

    return choose


def test_without_a_gpu_the_run_says_so_and_writes_nothing(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "new")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu: no CUDA GPU here")
    assert not (tmp_path / "new").exists()


def test_tests_that_do_not_end_are_stopped(suite, tmp_path: Path):
    suite("import time\ndef test_one():\n    time.sleep(600)\n")
    (check,) = gpu_tests.check(("cpu_flash",), "cpu", 0.0, tmp_path)
    assert not check.good
    assert check.stopped_after == 0.0


def test_every_backend_has_its_own_tests_run(suite, tmp_path: Path):
    suite(
        "import os, pytest\n"
        "@pytest.mark.parametrize('name', ['right', 'wrong'])\n"
        "def test_one(name):\n    assert os.environ['POSENC_TEST_DEVICE'] == 'cpu' and name != 'wrong'\n"
    )
    (check,) = gpu_tests.check(("right",), "cpu", 120.0, tmp_path)
    assert (check.backend, check.passed, check.failed, check.good) == ("right", 1, 0, True)
    assert not gpu_tests.verdict("wrong", tmp_path, None).good  # without a report
    text = '<testsuites><testsuite tests="5" failures="1" errors="1" skipped="1"/></testsuites>'
    (tmp_path / "tests-wrong.xml").write_text(text)
    check = gpu_tests.verdict("wrong", tmp_path, None)
    assert (check.passed, check.failed, check.skipped, check.good) == (2, 2, 1, False)


ALONE = """\
tests/contract/test_backends.py::TestRegistered::test_empty[triton] PASSED [ 10%]
tests/devices/test_devices.py::test_a_model[triton-lampe] FAILED         [ 20%]
tests/devices/test_devices.py::test_a_model[triton-dca]
"""
SIDE_BY_SIDE = """\
4 workers [9 items]
tests/devices/test_devices.py::test_a_model[triton-lampe]
[gw1] [ 11%] PASSED tests/contract/test_backends.py::TestRegistered::test_empty[triton]
[gw0] [ 22%] FAILED tests/devices/test_devices.py::test_a_model[triton-lampe]
"""


@pytest.mark.parametrize("log", [ALONE, SIDE_BY_SIDE])
def test_results_of_stopped_tests_are_counted(log: str, tmp_path: Path):
    (tmp_path / "tests-triton.log").write_text(log)
    check = gpu_tests.verdict("triton", tmp_path, 80.0)
    assert (check.passed, check.failed, check.stopped_after) == (1, 1, 80.0)
    assert not check.good
    (tmp_path / "tests-triton.log").write_text(log.replace("FAILED", "PASSED"))
    assert gpu_tests.verdict("triton", tmp_path, 80.0).good


def test_every_goal_is_measured():
    cases = [case for part in gpu_timing.parts(gpu_canary.BACKENDS, smoke=False) for case in part.cases()]
    assert len(cases) == len(set(cases))
    first = cases[0]  # the most important case
    assert (first.kind, first.backend, first.strategy, first.length) == ("attention", "triton", "lampe", 32768)
    measured = {(c.kind, c.cache, c.shape, c.length, c.strategy, c.backend, c.dtype, c.device) for c in cases}
    for target in GPU_TARGETS:
        for goal in target.goals:
            for strategy in target.strategies:
                who = (strategy, goal.gpu_backend, "bfloat16", "cuda")
                assert (goal.kind, goal.cache, goal.shape, goal.length, *who) in measured
    assert {c.length for c in cases if c.kind == "attention"} == {2**n for n in range(12, 18)}
    assert {c.length for c in cases if c.kind == "query"} == {2**n for n in range(13, 18)}


@dataclass
class Answers:
    """A worker that answers at once with a row that is `ratio` times slower than flash attention alone."""

    ratio: float = 1.0
    problem: str | None = None
    alive: bool = True

    def ask(self, call: str, limit: float, *, case: dict[str, Any], **options: Any) -> dict[str, Any]:
        if self.problem is not None:
            raise Died(self.problem)
        kept = {key: case[key] for key in case if key in results.BenchRow.model_fields}
        alone = {"flash": (0.1, 0.1, 0.1)}
        timed_row = row(**kept, plain=(0.2,) * 3, remapped=(0.1 * self.ratio,) * 3, baselines=alone)
        return {"row": timed_row.model_dump(mode="json"), "other_cores": 0.0}


def timed(tmp_path: Path, seconds: float = 600, **workers: Answers) -> tuple[list[results.BenchRow], list[str]]:
    """Return the rows measured with some workers, and the cases left out."""
    timing = gpu_timing.Timing(tmp_path / collect.FILE, workers, time.monotonic() + seconds)
    timing.measure(smoke=False)
    return list(collect.rows(tmp_path)), collect.left_out(tmp_path)


def test_no_case_starts_when_time_is_up(tmp_path: Path):
    rows, left_out = timed(tmp_path, seconds=gpu_timing.LAST_CASE - 1, triton=Answers())
    assert rows == []
    (line,) = left_out
    assert line.endswith("cases: no time was left")


def test_a_very_slow_backend_is_measured_only_twice(tmp_path: Path):
    rows, left_out = timed(tmp_path, torch_flash=Answers(ratio=3.5), triton=Answers(ratio=2.5))
    counted = Counter((row.backend, row.kind, row.cache) for row in rows)
    kinds = (("attention", "rotated"), ("query", "raw"), ("query", "rotated"))
    assert [counted["torch_flash", *kind] for kind in kinds] == [2, 2, 2]
    assert min(counted["triton", *kind] for kind in kinds if counted["triton", *kind]) > 20
    assert len(left_out) == 3  # one line per kind, for any number of cases
    assert all(re.match(r"torch_flash: \d+ cases: .*more than 3 times flash attention", line) for line in left_out)


def test_a_process_that_keeps_ending_is_left_out(tmp_path: Path):
    dead = Answers(problem="the process ended (SIGSEGV)", alive=False)
    rows, left_out = timed(tmp_path, xformers=dead, triton=Answers())
    assert {row.backend for row in rows} == {"triton"}
    assert left_out[0] == "xformers: 3 cases: the process ended (SIGSEGV)"
    assert re.fullmatch(r"xformers: \d+ cases: its process ended 3 times", left_out[1])


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there is a GPU, with tensors on the CPU and the wall clock."""
    from dataclasses import replace

    from posenc.bench import attention

    real = attention.build
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "build", lambda case: real(replace(case, device="cpu")))
    monkeypatch.setattr(cuda, "events", timing.wall)
    monkeypatch.setattr(cuda, "capture", lambda call: call)
    monkeypatch.setattr(cuda, "peak_bytes", lambda call: 1 if call() is None else 2**20)
    monkeypatch.setattr(
        cuda, "describe", lambda: {"gpu": "Made-Up GPU 80GB", "driver": "580.1", "versions": {"triton": "3.6.0"}}
    )


@pytest.mark.usefixtures("pretend")
def test_a_run_on_a_gpu_measures_every_case(monkeypatch):
    settings = BenchSettings(
        kinds=("attention", "query"),
        strategies=("rerope",),
        lengths=(64,),
        heads=("2/1x8",),
        device="cuda",
        rounds=3,
        caches=("raw", "rotated"),
    )
    said: list[str] = []
    result = run(settings, said.append)
    assert [(r.kind, r.cache, r.device, r.clock) for r in result.rows] == [
        ("attention", "rotated", "cuda", "events"),
        ("query", "raw", "cuda", "graph"),
        ("query", "rotated", "cuda", "graph"),
    ]
    assert all(r.memory is not None and r.memory.plain == 2**20 for r in result.rows)
    assert all(len(r.baselines["flash"]) == 3 for r in result.rows)
    assert said == [str(case) for case in settings.cases()]
    assert result.command.endswith("--device cuda --cache raw --cache rotated")
    assert result.file_name == "attention-query-2-1x8-64-float32-made-up-gpu-80gb.json"
    assert describe_machine(result.machine).startswith("Made-Up GPU 80GB, driver 580.1; ")
    assert result.machine.versions["triton"] == "3.6.0"

    def refuse(call: object) -> None:
        raise RuntimeError("cannot be captured")

    monkeypatch.setattr(cuda, "capture", refuse)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert run(settings, said.append).rows[1].clock == "events"


def test_the_page_compares_gpu_rows_with_gpu_goals():
    text = page({"a.json": result(gpu_row())})
    assert "No GPU has been measured yet" not in text
    assert "| 32/8x128 | 32768 | ≤ 0.80 | 0.88 **missed** [1] |" in text
    assert "timed by CUDA events." in text
    assert "| over flash alone | over cuDNN alone |" in text
    assert (
        "| 1.32 | 1.30 .. 1.35 (3) | 1.0 | 1.5 | 1.50 | 0.88 | 1.06 |" in text
    )  # ratios to plain, and to the two kernels alone
    cpu = sum(len(target.goals) * len(target.strategies) for target in TARGETS)
    assert f"**0 met, 0 missed, {cpu} not measured.**" in text  # no CPU goal applies to them
    assert "0.80 met [1]" in page({"a.json": result(gpu_row(remapped=(0.24, 0.24, 0.24)))})


def test_a_gpu_goal_applies_only_to_its_backend_dtype_and_cache():
    goal = GPU_TARGETS[0].goals[0]
    assert goal.applies(gpu_row())
    for change in ({"backend": "xformers"}, {"dtype": "float16"}, {"device": "cpu"}, {"kind": "query"}):
        assert not goal.applies(gpu_row(**change)), change
    assert not any(goal.applies(gpu_row()) for target in TARGETS for goal in target.goals)
    raw, kept = (gpu_row(kind="query", cache=cache) for cache in ("raw", "rotated"))
    titles = [[t.title for t in GPU_TARGETS if any(g.applies(r) for g in t.goals)] for r in (raw, kept)]
    assert len(titles[0]) == 2  # time and memory
    assert len(titles[1]) == 1


def test_a_row_without_a_flash_baseline_meets_no_goal():
    text = page({"a.json": result(gpu_row(baselines={}))})
    assert "| 32/8x128 | 32768 | ≤ 0.80 | not measured |" in text
    assert "over flash alone |" not in text


def test_decoding_must_not_copy_the_keys():
    memory = {"plain": 2**20, "remapped": 64 * 2**20}
    text = page({"a.json": result(gpu_row(kind="query", cache="raw", memory=memory))})
    assert "| 32/8x128 | 32768 | ≤ 16.00 | 64.00 **missed** [1] |" in text
    assert "- `query (raw keys)`: attention of one query over L raw keys; plain is" in text


def test_times_of_wrong_results_do_not_count():
    wrong = {"backend": "triton", "passed": 9, "failed": 1, "skipped": 0}
    data = json.loads(result(gpu_row(remapped=(0.24, 0.24, 0.24))).model_dump_json())
    data |= {"checks": [wrong], "left_out": ["xformers: not installed"]}
    text = page({"a.json": results.Result.model_validate(data)})
    assert "0.80 **fails its tests** [1]" in text
    assert "**0 met, 1 missed" in text
    assert "- `triton`: 9 passed, 1 failed" in text
    assert "- xformers: not installed" in text


def test_files_written_before_gpu_support_are_still_read():
    old = json.loads(result().model_dump_json())
    for item in ("checks", "left_out"):
        del old[item]
    for item in ("device", "clock", "cache", "baselines", "refused"):
        del old["rows"][0][item]
    for item in ("gpu", "driver"):
        del old["machine"][item]
    assert results.Result.model_validate_json(json.dumps(old)) == result()


def test_a_baseline_that_lacks_a_round_is_refused(tmp_path: Path):
    saved = results.save(result(gpu_row(baselines={"flash": (0.3, 0.3)})), tmp_path)
    with pytest.raises(InvalidInputError, match="a round lacks a side"):
        results.read(saved)
