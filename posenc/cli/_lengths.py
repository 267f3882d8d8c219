"""Lists of numbers on the command line, and options for the lengths and the number of inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class NumberList(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """``256,512,1024``: numbers separated by commas; repeated numbers count once."""

    def __init__(self, number: type[int] | type[float]) -> None:
        self.number = number
        self.name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            numbers = tuple(self.number(part) for part in value.replace(" ", "").split(",") if part)
        except ValueError:
            kind = "whole numbers" if self.number is int else "numbers"
            self.fail(f"{value!r} is not a list of {kind} separated by commas, such as 256,512.", param, ctx)
        if not numbers:
            self.fail("the list is empty.", param, ctx)
        return tuple(dict.fromkeys(numbers))


def lengths_option(help: str) -> Decorator:
    """``--lengths N,N,...``: input lengths in tokens."""
    return click.option("--lengths", type=NumberList(int), help=help)


score_option = click.option(
    "--score",
    "scored",
    type=int,
    default=128,
    show_default=True,
    help="Tokens to score at the end of each input.",
)


def documents_option(default: int, *, least: int) -> Decorator:
    """``--documents N``: the most documents that are cut from a text."""
    return click.option(
        "--documents", type=click.IntRange(least), default=default, show_default=True, help="Most documents to use."
    )


def lengths_in_windows(multiples: Sequence[int], window: int | None) -> tuple[int, ...]:
    """Input lengths in tokens that are these multiples of the window.

    Raises
    ------
    click.UsageError
        If the window is unknown.
    """
    if window is None:
        raise click.UsageError("the model's configuration does not tell its window: give --lengths.")
    return tuple(multiple * window for multiple in multiples)
