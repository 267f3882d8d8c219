"""``posenc plugins``: every entry point, what it brought and why it failed if it did."""

from __future__ import annotations

from dataclasses import asdict

import click

from posenc.cli._output import json_option, print_json, print_table


@click.command("plugins", short_help="List plugins, load times and failures.")
@json_option
def command(as_json: bool) -> None:
    """List the plugins found through the entry-point group 'posenc', with load times and failures.

    Every strategy is asked for a few plans, so that a broken one is found before a model is.
    """
    from posenc.evaluate.plugin_trial import tried_records
    from posenc.trace import quiet

    with quiet():  # failures are in the table; do not warn about them as well
        records = tried_records()
    if as_json:
        print_json([asdict(record) for record in records])
        return
    rows = [
        [
            record.name,
            f"{record.distribution} {record.version}".strip(),
            record.module,
            f"{record.seconds:.2f}",
            "\n".join([*record.provides, *(f"FAILED: {failure}" for failure in record.failures)]) or "nothing",
        ]
        for record in records
    ]
    print_table(
        f"plugins ({len(rows)})", ["name", "distribution", "module", "seconds", "brings"], rows, numbers=["seconds"]
    )
