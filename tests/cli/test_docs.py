"""What the documentation shows works as shown."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest

from posenc.cli._group import group
from posenc.cli._strategy import read_configs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"(    |\$ |)posenc [a-z-]", line)
    }
)


def blocks(page: str, language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return found


def test_the_strategy_of_the_guide_plans_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "halved.py").write_text(blocks("docs/write-a-strategy.md", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    halved = import_module("halved")
    plan = halved.Halved(near=10).plan(100)
    plan.check()
    relative = plan.relative_positions()
    assert relative[60, 55] == 5
    assert relative[60, 10] == 30
    registered: list[Any] = []
    halved.posenc_register_strategies(registered.append)
    assert registered == [halved.Halved]


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_in_the_documentation_parses(line: str):
    arguments = shlex.split(line.removeprefix("$ "), comments=True)[1:]
    with click.Context(group) as outer:
        verb = group.get_command(outer, arguments[0])
        assert verb is not None, arguments[0]
        verb.make_context(arguments[0], arguments[1:], parent=outer)


def test_the_quickstart_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(ROOT)
    exec(blocks("README.md", "python")[0], {})
    assert "lampe: prompt 2400, total 2400, window 256" in capsys.readouterr().out


def test_the_readme_shows_the_configuration_of_the_demo():
    shown = blocks("README.md", "text")[0]
    for config in read_configs(str(ROOT / "examples" / "demo.yaml")):
        assert f"\n {config.strategy.name} " in shown
