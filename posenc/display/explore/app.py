"""The web application: one page, made on the server from the address alone, so it works without scripts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flask import Flask, Response, render_template, request

from posenc.display.explore.controls import controls, read
from posenc.display.explore.view import look
from posenc.errors import InvalidInputError, PosencError
from posenc.plugins import OWN_DISTRIBUTION, strategies, strategy_info
from posenc.positions import IdentityStrategy

POLICY = "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; form-action 'self'; base-uri 'none'"


def make_app(*, name: str, window: int, prompt: int) -> Flask:
    """The application; the arguments are what the page begins with.

    Raises
    ------
    UnknownNameError
        If no such strategy is installed.
    """
    strategies()[name]
    app = Flask(__name__)
    app.config["TRUSTED_HOSTS"] = ["127.0.0.1", "localhost"]  # no other site may ask through a name of its own
    first = {"strategy": name, "window": str(window), "prompt": str(prompt)}

    @app.get("/")
    def page() -> tuple[str, int]:
        return render(request.args or first)

    @app.after_request
    def guard(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    return app


def render(entries: Mapping[str, str]) -> tuple[str, int]:
    """The page for what somebody entered, and its status: 400 with a message where it cannot be planned."""
    found = strategies()
    chosen = entries.get("strategy", IdentityStrategy.name)
    info = strategy_info(IdentityStrategy, OWN_DISTRIBUTION)
    shown: dict[str, Any] = {"view": None, "error": None}
    try:
        info = found[chosen]
        lengths = {key: _tokens(entries, key) for key in ("window", "prompt")}
        shown["view"] = look(chosen, params=read(entries, info.params), **lengths)
    except PosencError as error:
        shown["error"] = str(error)
    kinds: dict[str, list[str]] = {"positions": [], "frequencies": []}
    for each in found.values():
        kinds[each.kind].append(each.name)
    text = render_template(
        "page.html",
        info=info,
        kinds=kinds,
        controls=controls(info.params),
        entries=entries,
        kind=info.kind,
        **shown,
    )
    return text, 200 if shown["error"] is None else 400


def _tokens(entries: Mapping[str, str], key: str) -> int:
    text = entries.get(key, "").strip()
    try:
        return int(text)
    except ValueError:
        raise InvalidInputError(f"{key} must be a whole number of tokens, got {text!r}.") from None
