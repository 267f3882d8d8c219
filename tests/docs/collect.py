"""The code blocks of every page: what tests run.

Fenced blocks name their language, and no other kind is allowed:

| language | what is done with it |
|---|---|
| ``python`` | the blocks of a page run in order, in one namespace that has ``model``, ``tokenizer`` and ``inputs`` |
| ``bash`` | the commands of a page run in order, in a copy of the repository (``shell.py``) |
| ``python``, ``yaml`` with the first line ``# NAME.py`` | written to that file first; pytest runs ``test_*.py`` |
| ``yaml`` | read as a configuration or as a suite |
| ``toml`` | an entry point, which is loaded where a page shows its module |
| ``text`` | compared with what the code says, by a test of its own (``test_outputs.py``) |

Where no test can do that, the line before the block says why: ``<!-- untested: REASON -->``. CONTRIBUTING.md lists it.
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
    """One code block of a page; ``line`` is where it begins, ``untested`` why no test runs it."""

    page: str
    line: int
    language: str
    code: str
    untested: str | None = None

    @property
    def file(self) -> str | None:
        """The file that the block is, if it says so in its first line."""
        named = re.match(r"# (\w+\.(?:py|yaml))\n", self.code)
        return named[1] if named else None

    @property
    def commands(self) -> list[str]:
        """Its command lines."""
        joined = self.code.replace("\\\n", " ")
        return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """Every page that a reader sees: README files, the documentation, how to contribute, the changelog."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])


def page_names() -> list[str]:
    """Their paths from the root, as test names show them."""
    return [path.relative_to(ROOT).as_posix() for path in pages()]


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """The fenced blocks of a page."""
    found, inside, above = [], None, ""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.match(r"( *)```(\w*)", line)
        if fence is None:
            if inside is not None:
                inside[2].append(line.removeprefix(inside[3]))
        elif inside is None:
            mark = MARK.fullmatch(above.strip())
            inside = (number, fence[2], [], fence[1], mark and mark[1])
        else:
            found.append(Block(page, inside[0], inside[1], "\n".join(inside[2]) + "\n", inside[4]))
            inside = None
        above = line
    assert inside is None, f"{page}: the block that begins in line {inside[0]} has no end"
    return tuple(found)


def indented(page: str) -> list[str]:
    """Lines that Markdown shows as code though no fence says so: behind an empty line, not inside a list."""
    found, fenced, above, text = [], False, "", ""
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines():
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("    ") and not (fenced or above.strip()) and not re.match(r"[-*] |\d+\. ", text):
            found.append(line)
        if line.strip() and not line.startswith(" "):
            text = line
        above = line
    return found


def all_blocks(*languages: str) -> list[Block]:
    """The blocks of every page in one of the languages, all blocks if none is named."""
    return [block for page in page_names() for block in blocks(page) if not languages or block.language in languages]
