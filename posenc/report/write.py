"""Write the page: ``report.html`` and ``report.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posenc.files import make_folder, replacing
from posenc.report import html, markdown
from posenc.report.sections import sections
from posenc.report.sources import collect

INTRODUCTION = (
    "Every number comes with its standard error over documents, and every section with the command that makes it "
    "again. Strategies of one section saw the same documents, so their differences have smaller errors than the "
    "values: the tables of ratios show these."
)


def write_report(paths: Sequence[Path], out: Path, *, title: str = "Results", name: str = "report") -> list[Path]:
    """Read results and write both pages into a folder; returns the files.

    Parameters
    ----------
    paths : sequence of Path
        Results folders and files, as :func:`posenc.report.sources.collect` takes them.
    name : str
        Of the files, without their endings.

    Raises
    ------
    InvalidInputError
        If there are no results, one is damaged, or the pages cannot be written.
    """
    content = sections(collect(paths))
    make_folder(out)
    pages = {
        out / f"{name}.html": html.page(title, INTRODUCTION, content),
        out / f"{name}.md": markdown.page(title, INTRODUCTION, content),
    }
    for path, text in pages.items():
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return list(pages)
