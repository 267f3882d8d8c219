"""``posenc new plugin NAME`` and ``posenc new adapter NAME``: a new distribution to start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from posenc.cli._output import print_written

if TYPE_CHECKING:
    from posenc.cli._scaffold import Scaffold


@click.group("new", short_help="Start a plugin: a strategy or a model family.")
def command() -> None:
    """Write an installable distribution with one strategy or one adapter, its entry point and its tests."""


into_option = click.option("--into", metavar="FOLDER", default=".", help="Parent folder (default: the current one).")


@command.command("plugin", short_help="Write a plugin with a strategy.")
@click.argument("name")
@into_option
def plugin(name: str, into: str) -> None:
    """Write a distribution NAME with a position strategy of the same name."""
    _create("plugin", name, into)


@command.command("adapter", short_help="Write a plugin with a model family.")
@click.argument("name")
@into_option
def adapter(name: str, into: str) -> None:
    """Write a distribution NAME with an adapter for a model family."""
    _create("adapter", name, into)


def _create(scaffold: Scaffold, name: str, into: str) -> None:
    from posenc.cli._scaffold import create

    files = create(scaffold, name, into)
    print_written(files)
    click.echo(f'next: cd {files[0].parent} && pip install -e ".[test]" && pytest')
