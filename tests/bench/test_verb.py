"""``posenc bench`` from the outside: its output, its files, and its refusals before measuring."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from posenc.bench import memory, results

TINY = ("--strategy", "rerope", "--lengths", "64", "--heads", "2/1x8", "--model", "tiny", "--threads", "1")
QUICK = (*TINY, "--rounds", "1", "--no-memory")


def test_results_are_printed_as_json_and_written(run, tmp_path: Path):
    ran = run("bench", "attention", "prefill", *QUICK, "--json", "--out", tmp_path, "--plot", tmp_path / "ratio.png")
    assert ran.exit_code == 0, ran.output
    data = json.loads(ran.stdout)
    assert [(row["kind"], row["shape"]) for row in data["rows"]] == [("attention", "2/1x8"), ("prefill", "tiny")]
    for row in data["rows"]:
        assert len(row["plain"]) == len(row["remapped"]) == 1
        assert row["window"] == 16
        assert row["memory"] is None
    assert {"cpu", "cores", "load_before", "load_after", "other_cores", "versions"} <= set(data["machine"])
    file, plot = (Path(name) for name in data["files"])
    read = results.read(file)
    assert read.model_dump(mode="json") == {key: value for key, value in data.items() if key != "files"}
    assert plot.stat().st_size > 1000
    assert run("bench", "--report", tmp_path).exit_code == 0
    assert read.command in (tmp_path / "performance.md").read_text()
    assert str(tmp_path) not in file.read_text()


def test_the_recorded_command_repeats_the_run(run):
    first = json.loads(run("bench", "query", *QUICK, "--dtype", "bfloat16", "--window-share", "2", "--json").stdout)
    again = json.loads(run(*shlex.split(first["command"])[1:], "--json").stdout)
    assert again["command"] == first["command"]
    facts = [{key: row[key] for key in row if key not in ("first", "plain", "remapped")} for row in first["rows"]]
    assert facts == [{key: row[key] for key in facts[0]} for row in again["rows"]]


def test_the_table_shows_medians_and_spread(run):
    ran = run("bench", *QUICK)
    assert ran.exit_code == 0, ran.output
    for word in ("plain ms", "remapped ms", "ratio", "lowest .. highest", "rerope", "load average"):
        assert word in ran.stdout
    assert "MiB" not in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "length 0: must be at least 4"),
        (["--lengths", "-5"], "length -5: must be at least 4"),
        (["--strategy", "lampee"], "Did you mean 'lampe'?"),
        (["--backend", "cpu_flush"], "Did you mean 'cpu_flash'?"),
        (["train"], "no kind named 'train'"),
        (["--heads", "9-3-64"], "expected HQ/HKVxD"),
        (["--dtype", "int8"], "no dtype named 'int8'"),
        (["prefill", "--model", "huge"], "no model shape named 'huge'"),
        (["--threads", "0"], "threads 0: must be at least 1"),
        (["--rounds", "0"], "rounds 0: must be at least 1"),
        (["--window-share", "0"], "window share 0: must be at least 1"),
        (["--device", "tpu"], "no device named 'tpu'"),
        (["prefill", "--device", "cuda"], "prefill is measured on the CPU only"),
        (["--plot", "ratio.txt"], "a plot file must end in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_message_before_anything_is_measured(run, monkeypatch, arguments, message):
    monkeypatch.setattr("posenc.bench.run.build", lambda case: pytest.fail("measured"))
    ran = run("bench", *arguments)
    assert ran.exit_code == 2
    assert message in ran.stderr
    assert len(ran.stderr.splitlines()) == 1
    assert ran.stdout == ""


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_an_output_that_cannot_be_written_is_refused_before_measuring(run, monkeypatch, tmp_path: Path, option: str):
    monkeypatch.setattr("posenc.bench.run.build", lambda case: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    ran = run("bench", *QUICK, option, tmp_path / "file" / "x.png")
    assert ran.exit_code == 2
    assert "cannot be written" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


def test_report_measures_nothing(run):
    assert run("bench", "attention", "--report", "docs/results").exit_code == 2


@pytest.mark.skipif(not memory.available(), reason="this system does not tell a process its memory")
def test_the_measured_memory_is_that_of_the_call():
    code = (
        "import torch\nfrom posenc.bench.memory import peak_of\n"
        "torch.ones(50 << 20, dtype=torch.uint8)\n"  # an earlier peak that must not hide the next one
        "def call():\n    torch.ones(10 << 20, dtype=torch.uint8)\n    torch.ones(20 << 20, dtype=torch.uint8)\n"
        "print(peak_of(call))"
    )
    env = {**os.environ, **memory.RETURN_FREED}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert 19 << 20 < int(ran.stdout) < 24 << 20  # the system counts pages in batches


@pytest.mark.skipif(not memory.available(), reason="this system does not tell a process its memory")
def test_memory_is_measured_in_separate_processes(run):
    ran = run("bench", *TINY, "--rounds", "1", "--lengths", "1024", "--json")
    assert ran.exit_code == 0, ran.output
    (row,) = json.loads(ran.stdout)["rows"]
    assert row["memory"]["plain"] > 0
    assert row["memory"]["remapped"] > 0
