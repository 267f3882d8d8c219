"""Every code block of the documentation does what it shows."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

import posenc
from posenc.cli._group import group
from posenc.plugins import StrategyInfo, strategy_info
from tests.docs.collect import COMMANDS, LANGUAGES, ROOT, Block, all_blocks, blocks, commands, page_names
from tests.examples.load import example

QUICK = ("adapters", "list", "new", "plan", "plugins", "show")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run a page in: every named file of every page, and the repository's own folders to read."""
    for folder in ("posenc", "examples", "docs", "plugins", "adapters"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for block in all_blocks("python"):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture(scope="module")
def stage() -> dict[str, Any]:
    """What the blocks of a page may take for granted."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "posenc" / "models" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder),
        "tokenizer": tokenizer,
        "inputs": tokenizer("The quick brown fox " * 60, return_tensors="pt"),
    }


def run(page: str, stage: dict[str, Any]) -> None:
    """Run the unnamed Python blocks of a page in order; an error shows the page and its line."""
    names = {"__name__": page, **stage}
    for block in blocks(page):
        if block.language == "python" and block.file is None:
            padded = "\n" * block.line + block.code
            exec(compile(padded, str(ROOT / page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", page_names())
def test_every_block_names_its_language(page: str) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block} is {block.language!r}, not one of {', '.join(LANGUAGES)}"


@pytest.mark.parametrize(
    "page", [page for page in page_names() if any(b.language == "python" and not b.file for b in blocks(page))]
)
def test_python(page: str, stage: dict[str, Any], desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(page, stage)
    assert posenc.attached(stage["model"]) is None
    if page == "README.md":
        assert "lampe: prompt 2400, total 2400, window 256" in capsys.readouterr().out


def test_files_that_pages_show(desk: Path) -> None:
    names = [block.file for block in all_blocks("python") if block.file]
    assert len(names) == len(set(names)), "two pages show different files under one name"
    assert {"halved.py", "test_halved.py", "test_backend.py", "test_family.py"} <= set(names)
    for name in names:
        if not name.startswith("test_"):
            importlib.import_module(name.removesuffix(".py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *names],
        cwd=desk,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d\d passed", done.stdout)


def test_the_strategy_of_the_guide_plans_what_it_says(desk: Path) -> None:
    halved = importlib.import_module("halved")
    plan = halved.Halved(near=10).plan(100)
    relative = plan.relative_positions()
    assert (relative[60, 55], relative[60, 10]) == (5, 30)
    registered: list[Any] = []
    halved.posenc_register_strategies(registered.append)
    assert registered == [halved.Halved]


@pytest.mark.parametrize("block", all_blocks("yaml", "toml", "json"), ids=str)
def test_data(block: Block, tmp_path: Path) -> None:
    if block.language == "json":
        assert json.loads(block.code) is not None
    elif block.language == "toml":
        assert tomllib.loads(block.code)
    elif "strategy" in (data := yaml.safe_load(block.code)):
        (tmp_path / "shown.yaml").write_text(block.code, encoding="utf-8")
        assert posenc.load_config(tmp_path / "shown.yaml").strategy.name
    else:
        assert data


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 20
    assert {line.split()[0] for line, _ in commands()} >= {"posenc", "make", "pip", "pytest"}


@pytest.mark.parametrize(("line", "page"), commands())
def test_command(line: str, page: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    assert words[0] in COMMANDS, f"{page}: {words[0]!r} is no command that this test knows"
    check = {"posenc": check_posenc, "make": check_make, "pip": check_pip, "python": check_python}.get(words[0])
    if check is not None:
        check(words[1:], desk, monkeypatch)
    else:
        assert len(words) < 3 or (ROOT / words[1]).exists() or words[1] in ("install", "run")


def check_posenc(words: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The verb exists and its options parse; a quick one runs well."""
    if any(word.isupper() and len(word) > 1 for word in words):
        words = [{"NAME": "lampe", "FAMILY": "llama"}.get(word, word) for word in words]
    for name, info in strategies_of_pages().items():
        monkeypatch.setitem(posenc.strategies(), name, info)
    with click.Context(group) as outer:
        verb = group.get_command(outer, words[0])
        assert verb is not None, words[0]
        verb.make_context(words[0], words[1:], parent=outer)
    if words[0] in QUICK:
        result = CliRunner().invoke(group, words)
        assert result.exit_code == 0, result.output


def strategies_of_pages() -> dict[str, StrategyInfo]:
    """Strategies that a reader has installed by then."""
    template = example("plugin-template/plugin_template").PluginTemplate
    found = (template, importlib.import_module("halved").Halved)
    return {factory.name: strategy_info(factory, "a page") for factory in found}


def check_make(words: list[str], *_: Any) -> None:
    """There is such a target."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(words) <= targets


def check_pip(words: list[str], *_: Any) -> None:
    """It installs something, and the extras of posenc that it names exist."""
    assert words[0] == "install"
    for extra in re.findall(r"posenc\[([\w,]+)\]", " ".join(words)):
        assert set(extra.split(",")) <= set(PROJECT["optional-dependencies"])


def check_python(words: list[str], *_: Any) -> None:
    """The module or the file exists."""
    if words[0] == "-m":
        assert find_spec(words[1]) is not None
    else:
        assert (ROOT / words[0]).is_file()


def test_the_readme_shows_the_configuration_of_the_demo() -> None:
    from posenc.cli._strategy import read_configs

    shown = next(block.code for block in blocks("README.md") if block.language == "text")
    for config in read_configs(str(ROOT / "examples" / "demo.yaml")):
        assert f"\n {config.strategy.name} " in shown


def test_links_lead_somewhere() -> None:
    for page in page_names():
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not re.match(r"[a-z]+:", target):
                assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_a_broken_block_fails_with_its_page_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 1\n```\n\n```python\nassert x == 1\nassert x == 2\n```\n")
    blocks.cache_clear()
    monkeypatch.setattr("tests.docs.collect.ROOT", tmp_path)
    monkeypatch.setattr("tests.docs.test_blocks.ROOT", tmp_path)
    with pytest.raises(AssertionError) as caught:
        run("page.md", {})
    blocks.cache_clear()
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno + 1) == (page, 9)
