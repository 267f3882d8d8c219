"""Every shell block works as shown; those that no test can run are listed with their reasons."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import shell
from tests.docs.collect import ROOT, all_blocks, blocks, page_names

TEMPLATE = "examples/plugin-template/README.md"
"""Its commands run in a fresh environment: tests/packaging/test_new.py."""
WITH_COMMANDS = sorted({block.page for block in all_blocks("bash")} - {TEMPLATE})


def read_page(page: str, patch: pytest.MonkeyPatch) -> None:
    """Run the commands of a page in order, in the current folder, with the files that the page shows."""
    for block in blocks(page):
        if block.file is not None and block.language == "yaml":
            Path(block.file).write_text(block.code, encoding="utf-8")
            if "tasks:" in block.code:
                shell.cut(Path(block.file))
    for block in blocks(page):
        if block.language == "bash" and block.untested is None:
            for line in block.commands:
                with patch.context() as inner:
                    shell.run(line, inner)


def test_the_commands_cover_the_verbs() -> None:
    lines = [line for block in all_blocks("bash") for line in block.commands]
    assert len(lines) > 60
    assert {line.split()[1] for line in lines if line.startswith("posenc ")} >= {
        "bench",
        "calibrate",
        "doctor",
        "eval",
        "explore",
        "plan",
        "ppl",
        "report",
    }
    assert all(block.commands for block in all_blocks("bash"))


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_run(page: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_page(page, monkeypatch)


def test_untested_blocks_are_listed_and_parse() -> None:
    marked = [block for block in all_blocks() if block.untested is not None]
    section = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("\n## What no test runs\n")[1].split("\n## ")[0]
    )
    listed = re.findall(r"^\| `(.+?)` \| `(.+?)` \| (.+?) \|$", section, re.MULTILINE)
    assert sorted(listed) == sorted(
        (b.page, b.commands[0] if b.language == "bash" else b.code.split("\n")[0], b.untested) for b in marked
    )
    for block in marked:
        assert block.language in ("bash", "text"), f"{block}: a block in this language can be run"
        for line in block.commands if block.language == "bash" else ():
            shell.parse(line)


def test_every_mark_is_before_a_block() -> None:
    for page in page_names():
        written = re.findall(r"^\s*<!-- untested:", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(written) == sum(block.untested is not None for block in blocks(page)), page


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("posenc pln lampe", "no verb 'pln'"),
        ("posenc list | head", "needs a shell"),
        ("posenc list > file", "needs a shell"),
        ("posenc ppl --config nowhere.yaml", "nowhere.yaml"),
        ("posenc plan lampe --prompt 4096 --window 256 --param mapping_length=128", "lampe.mapping_length"),
        ("make no-such-target", "no-such-target"),
        ("pip install posenc no-such-distribution-at-all", "no-such-distribution-at-all"),
        ("TILES=tiles.json python3 -m scripts.micro", "this cannot be checked"),
        ("curl example.org", "do not know how to run 'curl'"),
    ],
)
def test_a_command_that_does_not_work_fails(line: str, says: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=re.escape(says)):
        shell.run(line, monkeypatch)


def test_options_that_do_not_exist_do_not_parse() -> None:
    with pytest.raises(Exception, match="No such option"):
        shell.parse("posenc bench attention --divice cuda")
    shell.parse("posenc bench attention --device cuda")


def test_nothing_is_written_into_the_repository(desk: Path) -> None:
    assert {path.name for path in desk.iterdir() if path.is_symlink()} == set(shell.FOLDERS)
    assert not any(path.resolve().is_relative_to(ROOT) for path in desk.rglob("*"))
