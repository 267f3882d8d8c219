"""``posenc explore``: choose parameters by looking."""

from __future__ import annotations

import click

from posenc.errors import PosencError


@click.command("explore", short_help="Choose parameters by looking, on a local page.")
@click.option("--strategy", "-s", "name", default="lampe", show_default=True, metavar="NAME", help="To begin with.")
@click.option("--window", type=click.IntRange(1), default=4096, show_default=True, help="Pretraining window in tokens.")
@click.option("--prompt", type=click.IntRange(1), default=16384, show_default=True, help="Prompt length in tokens.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="Port; 0 takes a free one.")
@click.option("--no-browser", is_flag=True, help="Do not open a browser.")
def command(name: str, window: int, prompt: int, port: int, no_browser: bool) -> None:
    """Serve a page on this machine (127.0.0.1) that draws a strategy's plan for any parameters."""
    try:
        import flask  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PosencError(
            f"posenc explore needs {error.name}, which is not installed. Run: pip install 'posenc[explore]'"
        ) from None
    import os
    import socket
    import webbrowser

    from werkzeug.serving import WSGIRequestHandler, make_server

    from posenc.display.explore.app import make_app

    class Quiet(WSGIRequestHandler):
        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Say nothing of requests; errors are still shown."""

    app = make_app(name=name, window=window, prompt=prompt)
    try:
        listening = socket.create_server(("127.0.0.1", port))  # werkzeug would print and leave by itself
    except OSError as error:
        raise PosencError(
            f"port {port} cannot be used ({os.strerror(error.errno or 0)}). Choose another one with --port."
        ) from None
    with listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        place = ("127.0.0.1", listening.getsockname()[1])
        server = make_server(*place, app, threaded=True, request_handler=Quiet, fd=listening.fileno())
        click.echo(f"posenc explore: {address} (stop it with Ctrl+C)")
        if not no_browser:
            webbrowser.open(address)
        server.serve_forever()
