"""What verbs print: tables and JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from posenc.files import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

PIPE_WIDTH = 110
"""Table width where stdout is no terminal."""

SHORT = 14
"""Columns whose cells are no longer than this are never wrapped."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


def console(pipe_width: int = PIPE_WIDTH) -> Console:
    """A rich console on stdout that neither guesses markup nor colours numbers."""
    import os
    import sys

    from rich.console import Console

    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else pipe_width
    return Console(width=wide, highlight=False, markup=False, emoji=False)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Sequence[str] = ()
) -> None:
    """Print a table; the columns in `numbers` are right-aligned and never cut."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    wide = 0
    cells = [[str(cell) for cell in row] for row in rows]
    for position, column in enumerate(columns):
        numeric = column in numbers
        longest = max((len(line) for row in cells for line in row[position].splitlines()), default=0)
        wide += max(longest, len(column)) + 3 if numeric else SHORT + 3
        table.add_column(
            column,
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=numeric or longest <= SHORT,
            min_width=longest if numeric else None,
        )
    for row in cells:
        table.add_row(*row)
    out = console(max(PIPE_WIDTH, wide))
    out.print(title, style="bold", soft_wrap=True)  # not the table's own title, which wraps at the table's width
    out.print(table)


def print_json(data: Any) -> None:
    """Print JSON that any parser reads: no NaN, no infinity."""
    click.echo(json.dumps(plain(data), indent=2))


@contextmanager
def progress(total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, silent where stderr is no terminal; call ``step(description, advance=1)``."""
    from rich.console import Console

    errors = Console(stderr=True)
    with progress_bar(errors) as bar:
        task = bar.add_task("", total=total)

        def step(description: str, advance: int = 1) -> None:
            bar.update(task, advance=advance, description=description)

        yield step


def progress_bar(console: Console) -> Progress:
    """The bar, with the time left by the mean speed of the whole run: one step may take minutes."""
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
