"""Collect the code blocks of every page for the tests.

Fenced blocks name their language, and only these languages are allowed:

| language | what the tests do with it |
|---|---|
| ``python`` | the blocks of a page run in order, in one namespace that has ``model``, ``tokenizer`` and ``inputs`` |
| ``bash`` | the commands of a page run in order, in a copy of the repository (``shell.py``) |
| ``python``, ``yaml`` with the first line ``# NAME.py`` | written to that file first; pytest runs ``test_*.py`` |
| ``yaml`` | read as a configuration or as a suite |
| ``toml`` | an entry point, which is loaded if a page shows its module |
| ``text`` | compared with the output of the code, by a test of its own (``test_outputs.py``) |

If no test can do that, the line before the block says why: ``<!-- untested: REASON -->``. CONTRIBUTING.md lists them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = ("python", "bash", "yaml", "toml", "text")
MARK = re.compile(r"<!-- untested: (.+) -->")


@dataclass(frozen=True)
class Block:
    """One code block of a page; ``line`` is its first line, ``untested`` says why no test runs it."""

    page: str
    line: int
    language: str
    code: str
    untested: str | None = None

    @property
    def file(self) -> str | None:
        """The name of the file that the block shows, if its first line names one."""
        named = re.match(r"# (\w+\.(?:py|yaml))\n", self.code)
        return named[1] if named else None

    @property
    def commands(self) -> list[str]:
        """The command lines of the block."""
        joined = self.code.replace("\\\n", " ")
        return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Return every page that a reader sees: README files, the documentation, how to contribute, the changelog."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def page_names() -> list[str]:
    """Return the paths of the pages from the root, as test names show them."""
    return [path.relative_to(ROOT).as_posix() for path in pages()]


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """Return the fenced blocks of a page."""
    page_blocks, inside, above = [], None, ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"( *)```(\w*)", line)
        if fence is None:
            if inside is not None:
                inside[2].append(line.removeprefix(inside[3]))
        elif inside is None:
            mark = MARK.fullmatch(above.strip())
            inside = (number, fence[2], [], fence[1], mark and mark[1])
        else:
            page_blocks.append(Block(page, inside[0], inside[1], "\n".join(inside[2]) + "\n", inside[4]))
            inside = None
        above = line
    assert inside is None, f"{page}: the block that begins at line {inside[0]} has no end"
    return tuple(page_blocks)


def indented(page: str) -> list[str]:
    """Return lines that Markdown shows as code without a fence: after an empty line, not inside a list."""
    lines, fenced, above, text = [], False, "", ""
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("    ") and not (fenced or above.strip()) and not re.match(r"[-*] |\d+\. ", text):
            lines.append(line)
        if line.strip() and not line.startswith(" "):
            text = line
        above = line
    return lines


def all_blocks(*languages: str) -> list[Block]:
    """Return the blocks of every page in one of the languages, or all blocks if none is named."""
    return [block for page in page_names() for block in blocks(page) if not languages or block.language in languages]
