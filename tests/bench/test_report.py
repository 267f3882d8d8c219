"""Result files: their content, refusals, and the page that is made only from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posenc.bench import results
from posenc.bench.goals import TARGETS, Goal
from posenc.bench.report import PAGE, describe_machine, page, write_report
from posenc.errors import InvalidInputError
from tests.bench.conftest import result, row

COMMITTED = Path(__file__).parents[2] / "docs" / "results"


def test_a_result_survives_its_file(tmp_path: Path):
    saved = results.save(result(), tmp_path)
    assert saved.name == "attention-9-3x64-4096-float32-2-threads-made-up-cpu-3-ghz-2-cores.json"
    assert results.read(saved) == result()
    assert [file.name for file in tmp_path.iterdir()] == [saved.name]


def test_the_page_is_made_from_the_files(tmp_path: Path):
    results.save(result(), tmp_path)
    text = write_report(tmp_path).read_text()
    assert "posenc bench attention --lengths 4096" in text
    assert "Made-Up CPU" in text
    assert "| 9/3x64 | 4096 | ≤ 1.15 | 1.25 **missed** [1] | not measured |" in text
    assert "1.10 .. 1.50 (3)" in text
    assert "**0 met, 2 missed, " in text
    (tmp_path / PAGE).unlink()
    assert write_report(tmp_path).read_text() == text
    results.save(result(row(remapped=(0.21, 0.21, 0.21), memory=None)), tmp_path)
    assert "1.05 met [1]" in write_report(tmp_path).read_text()


def test_every_goal_is_on_the_page():
    text = page({"one.json": result(row(kind="query"))})
    goals = sum(len(target.goals) * len(target.strategies) for target in TARGETS)
    assert f"**0 met, 0 missed, {goals} not measured.**" in text
    assert all(target.title in text for target in TARGETS)


def test_two_runs_of_one_case_are_both_shown():
    text = page({"a.json": result(), "b.json": result(row(remapped=(0.2, 0.2, 0.2)))})
    assert "1.25 **missed** [1], 1.00 met [2]" in text


@pytest.mark.parametrize(("measure", "value", "met"), [("time", 1.15, True), ("time", 1.16, False)])
def test_a_goal_is_an_upper_limit(measure, value, met):
    assert Goal("attention", "9/3x64", 4096, measure, 1.15).met(value) is met


def test_a_rate_is_a_lower_limit():
    goal = Goal("attention", "9/3x64", 4096, "rate", 0.95)
    assert goal.value(row()) == pytest.approx(0.8)
    assert not goal.met(0.8)
    assert goal.met(0.95)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"threads": 1}, {"length": 2048}, {"kind": "query"}])
def test_a_goal_applies_only_under_its_own_conditions(change):
    assert not Goal("attention", "9/3x64", 4096, "time", 1.15).applies(row(**change))


def test_a_busy_machine_is_reported():
    assert "do not trust" in describe_machine(result(other_cores=0.5).machine)
    assert "do not trust" not in describe_machine(result(load_before=2.0).machine)  # it may come from the run before
    assert "Other work" not in describe_machine(result(other_cores=None).machine)


def broken() -> dict[str, str]:
    good = result().model_dump(mode="json")
    uneven = json.loads(json.dumps(good))
    uneven["rows"][0]["plain"].pop()
    strange = json.loads(json.dumps(good))
    strange["rows"][0]["kind"] = "training"
    return {
        "half written": json.dumps(good)[:-40],
        "another format": json.dumps({"answers": [1, 2]}),
        "another version": json.dumps({**good, "version": 2}),
        "no rows": json.dumps({**good, "rows": []}),
        "uneven rounds": json.dumps(uneven),
        "unknown kind": json.dumps(strange),
        "empty": "",
    }


@pytest.mark.parametrize("name", broken())
def test_a_file_that_is_not_a_result_is_refused_by_name(run, tmp_path: Path, name: str):
    results.save(result(), tmp_path)
    (tmp_path / "other.json").write_text(broken()[name])
    ran = run("bench", "--report", tmp_path)
    assert ran.exit_code == 2
    assert len(ran.stderr.splitlines()) == 1
    assert "other.json" in ran.stderr
    assert not (tmp_path / PAGE).exists()


def test_bytes_that_are_not_text_are_refused(tmp_path: Path):
    (tmp_path / "other.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInputError, match=r"other\.json: not a result"):
        results.read_folder(tmp_path)


def test_a_folder_without_results_is_refused(run, tmp_path: Path):
    ran = run("bench", "--report", tmp_path)
    assert ran.exit_code == 2
    assert "no result files" in ran.stderr


def test_the_committed_page_is_made_from_the_committed_files():
    assert (COMMITTED / PAGE).read_text(encoding="utf-8") == page(results.read_folder(COMMITTED))
