"""Lists of numbers on the command line."""

from __future__ import annotations

from typing import Any

import click


class NumberList(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """``256,512,1024``: numbers separated by commas."""

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
