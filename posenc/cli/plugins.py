"""``posenc plugins``: every entry point, what it provides, and why it failed if it did."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from posenc.cli._output import json_option, print_json, print_table

if TYPE_CHECKING:
    from posenc.plugins import PluginRecord


@click.command("plugins", short_help="List plugins, load times and failures.")
@json_option
def command(as_json: bool) -> None:
    """List the plugins of the entry-point group 'posenc', with load times and failures.

    Every strategy plans a few lengths, so that a broken one is found before it meets a model.
    """
    from posenc.evaluate.plugin_trial import tried_records
    from posenc.trace import quiet

    with quiet():  # the table lists the failures, so do not warn about them too
        records = tried_records()
    if as_json:
        print_json([asdict(record) for record in records])
        return
    columns = ["name", "distribution", "module", "seconds", "provides"]
    print_table(f"plugins ({len(records)})", columns, [_row(record) for record in records], numbers=["seconds"])


def _row(record: PluginRecord) -> list[str]:
    outcome = [*record.provides, *(f"FAILED: {failure}" for failure in record.failures)]
    return [
        record.name,
        f"{record.distribution} {record.version}".strip(),
        record.module,
        f"{record.seconds:.2f}",
        "\n".join(outcome) or "nothing",
    ]
