"""``posenc calibrate`` on a random model: its output, its files and its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import posenc
from posenc.calibration.file import read
from posenc.evaluate.calibrate.bundle import parse_bundle


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    arguments = []
    for option, words in (("--text", "the quick brown fox "), ("--report-text", "jumps over the lazy dog ")):
        file = tmp_path / f"{option.strip('-')}.txt"
        file.write_text(words * 150)
        arguments += [option, str(file)]
    return arguments


def test_calibrate_prints_the_curves_and_writes_a_file_that_lampe_reads(run, small_model: Path, texts, tmp_path: Path):
    arguments = (
        "calibrate", small_model, *texts, "--lengths", "64,128", "--score", 16, "--documents", 3,
        "--out", tmp_path / "o",
    )  # fmt: skip
    first = run(*arguments)
    assert first.exit_code == 0, first.stderr
    for shown in (
        "head=4, mapping=32",
        "64 (1x)",
        "128 (2x)",
        "*",
        "native",
        "lampe (curve)",
        "U(l) = ",
        "resamplings",
        "nats behind",
    ):
        assert shown in first.stdout
    assert "only 3 documents: the choice will be uncertain" in first.stderr
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"cells", "calibration.yaml", "v-curves-lampe.png"}
    calibration = read(tmp_path / "o" / "calibration.yaml")
    assert calibration.model.name == str(small_model)
    made = posenc.strategy("lampe", window=64, mapping=tmp_path / "o" / "calibration.yaml")
    assert made.plan(128).max_relative < 64

    bundle = tmp_path / "new" / "bundle.json"
    again = json.loads(run(*arguments, "--json", "--file", tmp_path / "elsewhere.yaml", "--bundle", bundle).stdout)
    assert again.pop("files") == [str(tmp_path / "elsewhere.yaml"), str(bundle), str(tmp_path / "o/v-curves-lampe.png")]
    assert json.loads(bundle.read_text()) == again
    assert parse_bundle(again, source="").calibration.strategies == calibration.strategies
    assert read(tmp_path / "elsewhere.yaml").strategies == calibration.strategies
    assert len(again["sweeps"]["lampe"]["128"]) == 24
    assert {label: len(losses) for label, losses in again["reported"]["128"].items()} == {
        "native": 3,
        "lampe": 3,
        "lampe (curve)": 3,
    }
    assert all(len(point["losses"]) == 3 for point in again["sweeps"]["lampe"]["128"])


def test_another_dtype_is_measured_again_and_recorded(run, small_model: Path, texts, tmp_path: Path):
    arguments = (
        "calibrate",
        small_model,
        *texts,
        "--lengths",
        "64",
        "--score",
        16,
        "--out",
        tmp_path / "o",
        "-s",
        "ntk",
    )
    for dtype in ("float32", "bfloat16"):
        result = run(*arguments, "--dtype", dtype, "--file", tmp_path / f"{dtype}.yaml")
        assert result.exit_code == 0, result.stderr
    whole, half = (read(tmp_path / f"{dtype}.yaml") for dtype in ("float32", "bfloat16"))
    assert (whole.settings.dtype, half.settings.dtype) == ("torch.float32", "torch.bfloat16")
    assert whole.native[64].loss != half.native[64].loss


def test_a_dry_run_measures_and_writes_nothing(run, small_model: Path, texts, tmp_path: Path):
    arguments = ("calibrate", small_model, *texts, "--score", 16, "--out", tmp_path / "o", "--dry-run", "-s", "ntk")
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "cells of up to" in result.stdout
    assert "at most" in result.stdout
    data = json.loads(run(*arguments, "--json").stdout)
    assert {cell["length"] for cell in data["cells"]} == {64, 128, 256, 512}
    assert data["seconds"] > 0
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-s", "reropee"], "no strategy named 'reropee'. Did you mean 'rerope'?"),
        (["-s", "rope"], "strategy 'rope' cannot be calibrated"),
        (["--lengths", "99999"], "tokens, too short for an input of 99999"),
        (["--lengths", "64", "--score", "64"], "length 64: must be at least 65"),
        (["--text", "{folder}/missing.txt"], "missing.txt: cannot be read (No such file or directory)."),
        (["--text", "docstrings:no_such_package"], "no package 'no_such_package' with Python sources is installed"),
        (["--report-text", "{folder}/text.txt"], "is both a calibration text and the report text"),
        (["--out", "{folder}/text.txt/o"], "cannot be written (Not a directory)."),
        (["--file", "{folder}/text.txt/c.yaml"], "text.txt: cannot be written (File exists)."),
        (["--documents", "1"], "1 is not in the range x>=2."),
    ],
)
def test_bad_input_is_one_message(run, small_model: Path, tmp_path: Path, arguments: list[str], said: str):
    (tmp_path / "text.txt").write_text("the quick brown fox " * 100)
    given = [argument.format(folder=tmp_path) for argument in arguments]
    text = [] if "--text" in given else ["--text", tmp_path / "text.txt"]
    lengths = [] if "--lengths" in given else ["--lengths", "64,128"]
    out = [] if "--out" in given else ["--out", tmp_path / "o"]
    result = run("calibrate", small_model, *text, *lengths, "--score", 16, *out, *given)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.rglob("*.json"))


def test_a_missing_model_is_one_message(run):
    result = run("calibrate", "nowhere")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nowhere: no such model." in result.stderr
