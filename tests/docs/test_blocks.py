"""Every code block of the documentation works as shown."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import yaml

import posenc
from posenc.evaluate.sweep.suite import read_suite
from tests.docs import shell
from tests.docs.collect import LANGUAGES, ROOT, Block, all_blocks, blocks, indented, page_names


@pytest.fixture(scope="module")
def stage() -> dict[str, Any]:
    """The names that the blocks of a page may use."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT / "posenc" / "models" / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder),
        "tokenizer": tokenizer,
        "inputs": tokenizer("The quick brown fox " * 60, return_tensors="pt"),
    }


def run(page: str, stage: dict[str, Any]) -> None:
    """Run the unnamed Python blocks of a page in order; an error shows the page and the line."""
    names = {"__name__": page, **stage}
    for block in blocks(page):
        if block.language == "python" and block.file is None:
            padded = "\n" * block.line + block.code
            exec(compile(padded, str(ROOT / page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", page_names())
def test_every_block_names_its_language(page: str) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block} is {block.language!r}, not one of {', '.join(LANGUAGES)}"
    assert indented(page) == [], f"{page}: give code a fence that names its language"


@pytest.mark.parametrize(
    "page", [page for page in page_names() if any(b.language == "python" and not b.file for b in blocks(page))]
)
def test_python_blocks_run(page: str, stage: dict[str, Any], desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(page, stage)
    assert posenc.attached(stage["model"]) is None
    if page == "README.md":
        assert "lampe: prompt 2400, total 2400, window 256" in capsys.readouterr().out


def test_files_that_pages_show_pass_their_tests(desk: Path) -> None:
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


def test_the_strategy_of_the_guide_plans_as_described(desk: Path) -> None:
    halved = importlib.import_module("halved")
    plan = halved.Halved(near=10).plan(100)
    relative = plan.relative_positions()
    assert (relative[60, 55], relative[60, 10]) == (5, 30)
    registered: list[Any] = []
    halved.posenc_register_strategies(registered.append)
    assert registered == [halved.Halved]


def test_the_distribution_of_the_guide_can_be_built(desk: Path) -> None:
    (block,) = (block for block in blocks("docs/write-a-strategy.md") if block.language == "toml")
    folder = desk / "distribution"
    folder.mkdir()
    shutil.copy("halved.py", folder)
    (folder / "pyproject.toml").write_text(block.code, encoding="utf-8")
    shell.call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", ".", cwd=folder)
    (wheel,) = map(ZipFile, folder.glob("posenc_halved-*.whl"))
    assert "halved.py" in wheel.namelist()
    (points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(points).decode().split() == ["[posenc]", "halved", "=", "halved"]


@pytest.mark.parametrize("block", all_blocks("yaml", "toml"), ids=str)
def test_data_blocks_can_be_read(block: Block, desk: Path) -> None:
    (desk / "shown.yaml").write_text(block.code, encoding="utf-8")
    if block.language == "toml":
        ((name, module),) = tomllib.loads(block.code)["project"]["entry-points"]["posenc"].items()
        if (desk / f"{module}.py").exists():
            assert callable(EntryPoint(name, module, "posenc").load().posenc_register_strategies)
        else:
            assert module == "my_module"
    elif "tasks" in yaml.safe_load(block.code):
        assert read_suite("shown.yaml").strategies
    else:
        strategy = posenc.load_config("shown.yaml").make(256)
        assert strategy.plan(300).total == 300


def test_the_readme_shows_the_configuration_of_the_demo() -> None:
    from posenc.cli._strategy import read_configs

    shown = next(block.code for block in blocks("README.md") if block.language == "text")
    for config in read_configs(str(ROOT / "examples" / "demo.yaml")):
        assert f"\n {config.strategy.name} " in shown


def test_every_link_has_a_target() -> None:
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
