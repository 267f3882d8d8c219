"""``posenc explore``: choose parameters visually."""

from __future__ import annotations

import click

from posenc.errors import PosencError


@click.command("explore", short_help="Choose parameters visually, on a local page.")
@click.option("--strategy", "-s", "name", default="lampe", show_default=True, metavar="NAME", help="To start with.")
@click.option("--window", type=click.IntRange(1), default=4096, show_default=True, help="Pretraining window in tokens.")
@click.option("--prompt", type=click.IntRange(1), default=16384, show_default=True, help="Prompt length in tokens.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="Port; 0 takes a free one.")
@click.option("--no-browser", is_flag=True, help="Do not open a browser.")
def command(name: str, window: int, prompt: int, port: int, no_browser: bool) -> None:
    """Serve a page on this machine (127.0.0.1) that draws the plan of a strategy for any parameters."""
    try:
        import flask  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PosencError(
            f"posenc explore needs {error.name}, which is not installed. Run: pip install 'posenc[explore]'"
        ) from None
    from posenc.display.explore.app import make_app
    from posenc.display.explore.server import serve

    app = make_app(name=name, window=window, prompt=prompt)
    serve(app, port, announce=_print_address, open_browser=not no_browser)


def _print_address(address: str) -> None:
    click.echo(f"posenc explore: {address} (stop it with Ctrl+C)")
