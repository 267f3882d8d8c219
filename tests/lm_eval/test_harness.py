"""lm-evaluation-harness runs a model under a strategy, through its own command line, with our own short tasks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from posenc.errors import InvalidConfigError, PosencError, UnknownNameError
from posenc.evaluate import harness
from posenc.evaluate.models import TINY, load
from posenc.evaluate.texts import read_text, tokenize

HERE = Path(__file__).parent
GUIDE = HERE.parents[1] / "docs" / "evaluate.md"
LENGTH, COUNT = 700, 6


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both task files and their data: prose of three windows that contains words in a random order."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = load(TINY).tokenizer
    prose = tokenize(tokenizer, read_text())
    words = [word for token in range(len(tokenizer)) if re.fullmatch(" [a-z]{2,}", word := tokenizer.decode([token]))]
    lines = []
    for number in range(COUNT):
        rng = np.random.default_rng(number)
        right, wrong = ([str(word) for word in rng.choice(words, 12, replace=False)] for _ in range(2))
        begin, end = (tokenizer.decode(prose[at : at + LENGTH // 2]) for at in (9000 * number, 9000 * number + 4000))
        text = f"{begin}\n{''.join(right)}\n{end}\n{''.join(right[:4])}"
        choices = ["".join(right[4:8]), "".join(wrong[4:8])]
        lines.append(json.dumps({"text": text, "choices": choices, "answer": 0}))
    data = folder / "data.jsonl"
    data.write_text("\n".join(lines))
    for name in ("short_choice.yaml", "short_copy.yaml"):
        (folder / name).write_text((HERE / name).read_text().replace("DATA", str(data)))
    return folder


BOTH = ("posenc_short_choice", "posenc_short_copy")


@pytest.fixture(scope="module")
def manager(tasks: Path) -> Any:
    """A manager that knows only our tasks: finding the harness's own takes ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks), include_defaults=False)


def evaluate(manager: Any, arguments: str, *names: str, **options: Any) -> dict[str, Any]:
    """Return the harness's results by task, through its Python interface."""
    from lm_eval import simple_evaluate

    harness.register()
    found = simple_evaluate(
        "posenc",
        model_args=arguments,
        tasks=list(names),
        task_manager=manager,
        device="cpu",
        bootstrap_iters=0,
        **options,
    )
    results: dict[str, Any] = found["results"]
    return results


def test_the_command_of_the_guide_runs_the_harness(tasks: Path, tmp_path: Path):
    from posenc.cli._group import group

    (shown,) = (line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("posenc lm-eval"))
    _, *command = shown.replace("TASK", ",".join(BOTH)).split()
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path), "--device", "cpu"]
    result = CliRunner().invoke(group, command)
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    assert found[BOTH[0]]["acc,none"] >= 5 / COUNT
    assert found[BOTH[1]]["exact_match,none"] >= 3 / COUNT


def test_without_remapping_nothing_is_copied(manager: Any):
    assert evaluate(manager, "pretrained=tiny,strategy=rope", BOTH[1])[BOTH[1]]["exact_match,none"] == 0.0


def test_a_configuration_file_is_accepted(manager: Any, tmp_path: Path):
    file = tmp_path / "posenc.yaml"
    file.write_text("strategy: {name: lampe, mapping: {c: 150, a: 0.004, b: -1}, head: 64}\n")
    assert evaluate(manager, f"pretrained=tiny,config={file}", BOTH[0])[BOTH[0]]["acc,none"] >= 4 / COUNT


def test_inputs_are_not_cut_at_the_window():
    from posenc.evaluate.harness_model import PosencLM

    assert PosencLM("tiny", strategy="rope", device="cpu").max_length == 16 * 256
    assert PosencLM("tiny", strategy="rope", device="cpu", max_length=300).max_length == 300


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, InvalidConfigError, "either strategy=NAME or config=FILE"),
        ({"strategy": "rope", "config": "a.yaml"}, InvalidConfigError, "either strategy=NAME or config=FILE"),
        ({"strategy": "lmpe"}, UnknownNameError, "Did you mean 'lampe'"),
        ({"strategy": "lampe", "mapping": -3}, InvalidConfigError, "mapping"),
        ({"strategy": "lampe", "mapping": 99, "batch_size": 4}, InvalidConfigError, "Use batch_size=1"),
        ({"strategy": "rerope", "active_from": 300, "batch_size": 4}, InvalidConfigError, "Use batch_size=1"),
        ({"strategy": "rope", "frequencies": "dynamic", "batch_size": "auto"}, InvalidConfigError, "Use batch_size=1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], said: str):
    from posenc.evaluate.harness_model import PosencLM

    with pytest.raises(error, match=said):
        PosencLM("tiny", device="cpu", **arguments)


def test_allowed_batches_are_exact(manager: Any):
    arguments = "pretrained=tiny,strategy=rerope,window_size=96"
    alone, batched = (evaluate(manager, arguments, *BOTH, batch_size=size) for size in (1, 3))
    assert alone == batched


def test_without_arguments_the_command_shows_its_help():
    from posenc.cli._group import group

    assert "--model posenc" in CliRunner().invoke(group, ["lm-eval"]).output


def test_without_the_harness_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    with pytest.raises(PosencError, match=r"posenc\[lm-eval\]"):
        harness.run(["run"])
