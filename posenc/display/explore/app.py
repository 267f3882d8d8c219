"""The web application: one page, made on the server from the address alone, so that it works without scripts."""

from __future__ import annotations

from collections.abc import Mapping

from flask import Flask, Response, render_template, request

from posenc.display.explore.controls import controls, read
from posenc.display.explore.view import View, make_view
from posenc.errors import InvalidInputError, PosencError
from posenc.plugins import OWN_DISTRIBUTION, strategies, strategy_info
from posenc.positions import IdentityStrategy

POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'none'"


def make_app(*, name: str, window: int, prompt: int) -> Flask:
    """Make the application; the arguments are the choice that the page starts with.

    Raises
    ------
    UnknownNameError
        If no such strategy is installed.
    """
    strategies()[name]
    app = Flask(__name__)
    app.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost"]  # another site cannot reach it by a name of its own
    start = {"strategy": name, "window": str(window), "prompt": str(prompt)}

    @app.get("/")
    def page() -> tuple[str, int]:
        return render(request.args or start)

    @app.after_request
    def guard(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    return app


def render(entries: Mapping[str, str]) -> tuple[str, int]:
    """Render the page for the entries of its form; returns its text and status, 400 if they cannot be planned."""
    installed = strategies()
    name = entries.get("strategy", IdentityStrategy.name)
    info = strategy_info(IdentityStrategy, OWN_DISTRIBUTION)
    view, message = None, None
    try:
        info = installed[name]
        view = _view(name, entries)
    except PosencError as error:
        message = str(error)
    names: dict[str, list[str]] = {"positions": [], "frequencies": []}
    for strategy in installed.values():
        names[strategy.kind].append(strategy.name)
    text = render_template(
        "page.html",
        info=info,
        names=names,
        controls=controls(info.params),
        entries=entries,
        view=view,
        error=message,
    )
    return text, 200 if message is None else 400


def _view(name: str, entries: Mapping[str, str]) -> View:
    params = strategies()[name].params
    return make_view(
        name,
        window=_tokens(entries, "window"),
        prompt=_tokens(entries, "prompt"),
        params=read(entries, params),
    )


def _tokens(entries: Mapping[str, str], key: str) -> int:
    text = entries.get(key, "").strip()
    try:
        return int(text)
    except ValueError:
        raise InvalidInputError(f"{key} must be a whole number of tokens, got {text!r}.") from None
