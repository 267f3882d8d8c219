"""Depths in a suite: the places in the context where something is hidden."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

Depth = Annotated[float, Field(ge=0, le=1)]


def _distinct(depths: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(depths)) < len(depths):
        raise ValueError("the same depth comes twice")
    return depths


Depths = Annotated[tuple[Depth, ...], Field(min_length=1), AfterValidator(_distinct)]
"""One or more different shares of the context: 0 is its start, 1 its end."""
