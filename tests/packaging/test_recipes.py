"""The recipes that measure docs/results again: commands that exist, run as benchmarks/recipes.toml says."""

from __future__ import annotations

import json
import re
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from scripts import recipes
from scripts.environments import ROOT
from tests.docs import shell

RECIPES = recipes.read()
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def write(folder: Path, text: str) -> recipes.Recipe:
    (folder / "recipes.toml").write_text(f"[it]\n{text}", encoding="utf-8")
    return recipes.read(folder / "recipes.toml")["it"]


def test_make_has_a_target_for_every_recipe() -> None:
    targets = re.findall(r"^([a-z0-9-]+): .*\n\t\$\(RECIPE\)$", MAKEFILE, re.MULTILINE)
    assert sorted(targets) == sorted(RECIPES)
    assert "\nRECIPE = $(BIN)/python -m scripts.recipes $@\n" in MAKEFILE


@pytest.mark.parametrize("name", RECIPES)
def test_every_command_exists_and_its_options_are_understood(name: str) -> None:
    for command in RECIPES[name].commands:
        for line in (command.run, command.condition):
            program, *rest = shlex.split(line or "test")
            if program == "posenc":
                shell.parse(shlex.join(command.words(ROOT)))
            elif program == "python":
                assert rest[0] == "-m"
                assert find_spec(rest[1]) is not None
            else:
                assert program == "test"


def test_a_suite_is_measured_into_the_file_that_the_page_reads() -> None:
    (page,) = RECIPES["results-page"].commands
    lines = [shlex.split(command.run) for name in RECIPES for command in RECIPES[name].commands]
    bundles = [words[words.index("--bundle") + 1] for words in lines if "--bundle" in words]
    assert sorted(bundles) == sorted(file for file in page.files if "*" not in file)
    for words in lines:
        if words[:2] == ["posenc", "eval"]:
            assert words[-1] == f"docs/results/eval/{Path(words[2]).stem}.json"


@pytest.mark.parametrize("name", ["calibrate", "calibrate-qwen3"])
def test_a_calibration_recipe_is_the_command_in_its_files(name: str) -> None:
    (command,) = RECIPES[name].commands
    words = command.words(ROOT)
    file, bundle = (ROOT / words[words.index(option) + 1] for option in ("--file", "--bundle"))
    assert shlex.split(yaml.safe_load(file.read_text(encoding="utf-8"))["command"]) == words
    assert shlex.split(json.loads(bundle.read_text(encoding="utf-8"))["calibration"]["command"]) == words


def test_commands_run_in_order_until_one_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write(
        tmp_path,
        """
        environment = { WORD = "blue" }
        commands = [
            "python -c 'import os, sys; print(os.environ[\\"WORD\\"], sys.executable)'",
            { if = "test -f no-such-file", run = "touch left-out" },
            { if = "test -f recipes.toml", run = "touch a.json" },
            { run = "echo all", files = ["b.json", "a.json", "*.json"] },
            "python -c 'raise SystemExit(3)'",
            "touch after-the-failure",
        ]
        """,
    )
    assert recipe.execute(tmp_path) == 3
    printed = capfd.readouterr().out
    assert f"blue {Path(sys.executable).parent}" in printed
    assert "left out, because that failed: touch left-out" in printed
    assert "\nall a.json\n" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "recipes.toml"]
    assert recipe.script(tmp_path).splitlines()[:3] == [
        "export WORD=blue",
        """python -c 'import os, sys; print(os.environ["WORD"], sys.executable)'""",
        "if test -f no-such-file; then touch left-out; fi",
    ]


@pytest.mark.parametrize("text", ["commands = [{ run = 'true', when = 'false' }]", "commands = []\nwhen = 'false'"])
def test_an_unknown_key_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValidationError, match="when"):
        write(tmp_path, text)


def test_a_dry_run_prints_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipes.main(["bench", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(RECIPES["bench"].commands)
    assert lines[-1] == "posenc bench --report docs/results"
