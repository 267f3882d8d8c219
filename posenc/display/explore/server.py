"""Serve the page on this machine, and open it in a browser."""

from __future__ import annotations

import os
import socket
import webbrowser
from collections.abc import Callable

from flask import Flask
from werkzeug.serving import WSGIRequestHandler, make_server

from posenc.errors import PosencError

HOST = "127.0.0.1"


class _SilentRequests(WSGIRequestHandler):
    """Print errors, but no line per request."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def serve(app: Flask, port: int, *, announce: Callable[[str], None], open_browser: bool) -> None:
    """Serve an application until it is interrupted.

    Parameters
    ----------
    port : int
        Port on 127.0.0.1; 0 takes a free one.
    announce : callable
        Called with the address once the port is open.
    open_browser : bool
        Whether to open the address in a browser.

    Raises
    ------
    PosencError
        If the port cannot be used.
    """
    with _listen(port) as listening:
        port = listening.getsockname()[1]
        server = make_server(HOST, port, app, threaded=True, request_handler=_SilentRequests, fd=listening.fileno())
        address = f"http://{HOST}:{port}/"
        announce(address)
        if open_browser:
            webbrowser.open(address)
        server.serve_forever()


def _listen(port: int) -> socket.socket:
    try:
        return socket.create_server((HOST, port))  # werkzeug itself would print a message and exit
    except OSError as error:
        raise PosencError(
            f"port {port} cannot be used ({os.strerror(error.errno or 0)}). Choose another one with --port."
        ) from None
