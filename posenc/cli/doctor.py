"""``posenc doctor``: check whether posenc runs here, and print a report for bug reports."""

from __future__ import annotations

import click

from posenc.cli._output import json_option, print_json


@click.command("doctor", short_help="Check whether posenc runs here.")
@json_option
def command(as_json: bool) -> None:
    """Check versions, backends and plugins, and run a self-test of a few seconds; exit status 1 if it fails.

    The report contains no path, user name or host name: paste it into a bug report as it is.
    """
    from posenc.cli._doctor import as_text, examine
    from posenc.trace import quiet

    with quiet("posenc", "xformers"):  # the report lists failures, so do not warn about them too
        report = examine()
    if as_json:
        print_json(report)
    else:
        click.echo(as_text(report))
    if not report["self_test"]["passed"]:
        raise SystemExit(1)
