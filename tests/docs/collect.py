"""The code blocks of every page: what tests run.

Fenced blocks name their language; of blocks that are only indented, lines that begin with a known command count.

| language | what is done with it |
|---|---|
| ``python`` | the blocks of a page run in order, in one namespace that has ``model``, ``tokenizer`` and ``inputs`` |
| ``python``, first line ``# NAME.py`` | written to that file first, for all pages; pytest runs ``test_*.py`` |
| ``bash``, and indented commands | every command must exist and its options parse; quick verbs are run |
| ``yaml``, ``toml``, ``json`` | parsed; YAML with a ``strategy`` is read as a configuration |
| ``text`` | output, pictures and messages: not run |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
LANGUAGES = ("python", "bash", "yaml", "toml", "json", "text")
COMMANDS = ("posenc", "make", "pip", "python", "pytest", "pre-commit")


@dataclass(frozen=True)
class Block:
    """One code block of a page; ``line`` is where it begins."""

    page: str
    line: int
    language: str
    code: str

    @property
    def file(self) -> str | None:
        """The file that the block is, if it says so in its first line."""
        named = re.match(r"# (\w+\.py)\n", self.code)
        return named[1] if named and self.language == "python" else None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every page that a reader sees: README files, the documentation, how to contribute."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return sorted(path for path in found if path.name != "CHANGELOG.md")


def page_names() -> list[str]:
    """Their paths from the root, as test names show them."""
    return [path.relative_to(ROOT).as_posix() for path in pages()]


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """The fenced blocks of a page."""
    found, inside = [], None
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"( *)```(\w*)", line)
        if fence is None:
            if inside is not None:
                inside[2].append(line.removeprefix(inside[3]))
        elif inside is None:
            inside = (number, fence[2], [], fence[1])
        else:
            found.append(Block(page, inside[0], inside[1], "\n".join(inside[2]) + "\n"))
            inside = None
    assert inside is None, f"{page}: the block that begins in line {inside[0]} has no end"
    return tuple(found)


def all_blocks(*languages: str) -> list[Block]:
    """The blocks of every page in one of the languages, all blocks if none is named."""
    return [block for page in page_names() for block in blocks(page) if not languages or block.language in languages]


def commands() -> list[tuple[str, str]]:
    """Every command line of the documentation, with the page it is from."""
    found: dict[str, str] = {}
    for page in page_names():
        text = (ROOT / page).read_text(encoding="utf-8")
        outside = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
        indented = [line[4:] for line in outside.splitlines() if line.startswith("    ")]
        fenced = [line for block in blocks(page) if block.language == "bash" for line in block.code.splitlines()]
        candidates = [line.strip() for line in indented if line.split()[:1] and line.split()[0] in COMMANDS]
        for line in [*candidates, *(line.strip() for line in fenced if line.strip() and not line.startswith("#"))]:
            found.setdefault(line, page)
    return list(found.items())
