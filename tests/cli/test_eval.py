"""posenc eval and posenc report on the command line: their output, and one message for every wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

SUITE = """
name: look
model: {model}
lengths: [1x, 100]
strategies: [rope, {{strategy: {{name: rerope, window_size: 24}}}}]
tasks:
  - {{task: perplexity, documents: 2, scored: 16}}
  - {{task: passkey, documents: 1, depths: [0.5], text: {text}}}
"""


@pytest.fixture
def suite(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a suite for the small model into the working folder, with lengths that fit its own sentences."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox.txt").write_text("the quick brown fox jumps over the lazy dog " * 300)
    path = Path("look.yaml")
    text = SUITE.format(model=small_model, text="fox.txt").replace("[1x, 100]", "[4x, 300]")
    path.write_text(text)
    return path


def test_a_dry_run_prints_the_cells_and_measures_nothing(run: Run, suite: Path):
    result = run("eval", suite, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "look: 8 cells" in result.stdout
    assert "8 cells to do, about" in result.stdout
    assert not Path("out").exists()
    planned = json.loads(run("eval", suite, "--dry-run", "--json").stdout)
    assert [cell["tokens"] for cell in planned["cells"]][:2] == [256, 300]
    assert not any(cell["done"] for cell in planned["cells"])


def test_a_suite_is_measured_once_and_reported(run: Run, suite: Path):
    first = run("eval", suite, "--bundle", "all.json")
    assert first.exit_code == 0, first.output
    assert "8 cells measured, 0 were there already" in first.stdout
    assert "perplexity, lower is better, 2 documents" in first.stdout
    assert "256 (4x)" in first.stdout
    again = run("eval", suite)
    assert "0 cells measured, 8 were there already" in again.stdout
    assert json.loads(run("eval", suite, "--dry-run", "--json").stdout)["seconds_left"] == 0
    printed = json.loads(run("eval", suite, "--json").stdout)
    assert {key: printed[key] for key in ("name", "window")} == {"name": "look", "window": 64}
    report = run("report", "out/eval/look", "--out", "pages")
    assert report.exit_code == 0, report.output
    from_bundle = run("report", "all.json", "--out", "other", "--json")
    files = json.loads(from_bundle.stdout)["files"]
    assert files == ["other/report.html", "other/report.md"]
    kept = [Path(folder, "report.md").read_text().replace("out/eval/look", "all.json") for folder in ("pages", "other")]
    assert kept[0] == kept[1]
    assert "posenc eval look.yaml" in kept[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "missing.yaml"], "missing.yaml: cannot be read"),
        (["eval", "look.yaml", "--slurm", "a=1"], "--slurm belongs to --executor slurm"),
        (["eval", "look.yaml", "--executor", "slurm", "--slurm", "a"], "--slurm 'a': expected KEY=VALUE"),
        (["eval", "look.yaml", "--bundle", "no/where.json"], "there is no folder no"),
        (["eval", "look.yaml", "--out", "fox.txt"], "fox.txt: is a file"),
        (["eval", "look.yaml", "--workers", "0"], "--workers"),
        (["eval", "look.yaml", "--executor", "slurm"], "submitit"),
        (["report"], "RESULTS"),
        (["report", "fox.txt"], "fox.txt: not a result"),
        (["report", "nowhere"], "nowhere: does not exist"),
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_message(arguments: list[str], said: str, run: Run, suite: Path):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr
