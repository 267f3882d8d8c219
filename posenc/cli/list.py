"""``posenc list``: what is installed."""

from __future__ import annotations

import click

from posenc.cli._output import json_option, print_json, print_table


@click.command("list", short_help="List strategies, adapters, backends or tasks.")
@click.option("--adapters", "seam", flag_value="adapters", help="List the adapters of model families.")
@click.option("--backends", "seam", flag_value="backends", help="List the attention backends.")
@click.option("--tasks", "seam", flag_value="tasks", help="List the tasks that a suite of 'posenc eval' may name.")
@json_option
def command(seam: str | None, as_json: bool) -> None:
    """List strategies (or adapters, backends or tasks), each with the distribution that provides it."""
    from posenc import plugins

    seam = seam or "strategies"
    columns, rows = getattr(plugins, seam)().table()
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(f"{seam} ({len(rows)})", columns, rows)
