"""What verbs print: tables, JSON and file names on stdout, progress on stderr.

rich and YAML are imported where they are used, because ``--help`` must not wait for them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

PIPE_WIDTH = 110
"""Width of tables in characters if stdout is not a terminal."""

SHORT = 14
"""Columns whose cells are no longer than this are never wrapped."""

GAP = 3
"""Characters between two columns."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would be measured, with a time estimate.")


def console(pipe_width: int = PIPE_WIDTH) -> Console:
    """Make a rich console on stdout that interprets no markup and does not highlight numbers."""
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else pipe_width
    return Console(width=width, highlight=False, markup=False, emoji=False)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()
) -> None:
    """Print a table; the columns in `numbers` are right-aligned and never truncated."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    cells = [[str(cell) for cell in row] for row in rows]
    width = 0
    for position, column in enumerate(columns):
        longest = max((len(line) for row in cells for line in row[position].splitlines()), default=0)
        width += _add_column(table, column, longest, numeric=column in numbers)
    for row in cells:
        table.add_row(*row)
    out = console(max(PIPE_WIDTH, width))
    out.print(title, style="bold", soft_wrap=True)  # not the table's own title, which wraps at the table's width
    out.print(table)


def _add_column(table: Table, column: str, longest: int, *, numeric: bool) -> int:
    """Add a column whose longest line has so many characters; returns the least width that it needs."""
    table.add_column(
        column,
        justify="right" if numeric else "left",
        overflow="fold",
        no_wrap=numeric or longest <= SHORT,
        min_width=longest if numeric else None,
    )
    return GAP + (max(longest, len(column)) if numeric else SHORT)


def print_json(data: Any) -> None:
    """Print JSON that any parser reads: without NaN and infinity."""
    from posenc.files import plain

    click.echo(json.dumps(plain(data), indent=2))


def print_written(files: Iterable[object], *, plots: bool = True) -> None:
    """Print the files that a verb wrote, one per line, and how to get plots if it drew none."""
    click.echo("written:")
    for file in files:
        click.echo(f"  {file}")
    if not plots:
        click.echo("no plots: matplotlib is not installed. Run: pip install 'posenc[plot]'")


def duration(seconds: float) -> str:
    """A duration in words, such as ``90 s``, ``12 min`` or ``2.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr if it is a terminal; call ``step(description, advance=1)``."""
    from rich.console import Console

    with progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)

        def step(description: str, advance: int = 1) -> None:
            bar.update(task, advance=advance, description=description)

        yield step


def progress_bar(console: Console) -> Progress:
    """Make the bar; it estimates the time left from the mean speed of the whole run, since a step may take minutes."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
        speed_estimate_period=math.inf,
    )
