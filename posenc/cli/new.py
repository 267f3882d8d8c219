"""``posenc new plugin NAME`` and ``posenc new adapter NAME``: a distribution to begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from posenc.cli._scaffold import Kind


@click.group("new", short_help="Begin a plugin: a strategy or a model family.")
def command() -> None:
    """Write an installable distribution with one strategy or one adapter, its entry point and its tests."""


into = click.option("--into", metavar="FOLDER", default=".", help="Where to put its folder (default: here).")


@command.command("plugin", short_help="With a strategy.")
@click.argument("name")
@into
def plugin(name: str, into: str) -> None:
    """Write a distribution NAME with a position strategy of the same name."""
    _create("plugin", name, into)


@command.command("adapter", short_help="With a model family.")
@click.argument("name")
@into
def adapter(name: str, into: str) -> None:
    """Write a distribution NAME with an adapter for a model family."""
    _create("adapter", name, into)


def _create(kind: Kind, name: str, into: str) -> None:
    from posenc.cli._scaffold import create

    written = create(kind, name, into)
    click.echo("written:")
    for path in written:
        click.echo(f"  {path}")
    click.echo(f'next: cd {written[0].parent} && pip install -e ".[test]" && pytest')
