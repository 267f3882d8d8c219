"""``posenc report RESULTS``: one HTML page and the same in Markdown."""

from __future__ import annotations

from pathlib import Path

import click

from posenc.cli._output import json_option, print_json
from posenc.cli._paths import FilePath


@click.command("report", short_help="Make a page of results.")
@click.argument("results", nargs=-1, required=True, type=FilePath())
@click.option("--out", type=FilePath(), help="Folder for the pages [default: that of the first result].")
@click.option("--title", default="Results", show_default=True, help="Heading of the page.")
@click.option("--name", default="report", show_default=True, help="Name of the files, without .html and .md.")
@json_option
def command(results: tuple[Path, ...], out: Path | None, title: str, name: str, as_json: bool) -> None:
    """Make one self-contained HTML page, and the same page in Markdown.

    RESULTS are folders and files of posenc eval, posenc calibrate (its file, or its --bundle) and posenc
    bench --out.
    """
    from posenc.report.write import write_report

    first = results[0]
    files = write_report(results, out or (first if first.is_dir() else first.parent), title=title, name=name)
    if as_json:
        print_json({"files": [str(file) for file in files]})
        return
    for file in files:
        click.echo(f"written: {file}")
