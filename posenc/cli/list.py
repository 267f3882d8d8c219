"""``posenc list``: what is installed."""

from __future__ import annotations

import click

from posenc.cli._output import json_option, print_json, print_table
from posenc.cli._strategy import kind_of


@click.command("list", short_help="List strategies, adapters or backends.")
@click.option("--adapters", "seam", flag_value="adapters", help="List the model families that are served.")
@click.option("--backends", "seam", flag_value="backends", help="List the attention backends.")
@json_option
def command(seam: str | None, as_json: bool) -> None:
    """List strategies (or adapters, or backends) and the distribution each comes from."""
    from posenc import plugins

    if seam == "adapters":
        columns = ["name", "summary", "serves", "distribution"]
        rows = [[i.name, i.summary, ", ".join(i.capabilities), i.distribution] for i in plugins.adapters().values()]
    elif seam == "backends":
        columns = ["name", "summary", "devices", "distribution"]
        rows = [
            [i.name, i.summary, ", ".join(i.capabilities.devices), i.distribution] for i in plugins.backends().values()
        ]
    else:
        columns = ["name", "kind", "summary", "paper", "distribution"]
        rows = [[i.name, kind_of(i), i.summary, i.paper, i.distribution] for i in plugins.strategies().values()]
    if as_json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        print_table(f"{seam or 'strategies'} ({len(rows)})", columns, rows)
