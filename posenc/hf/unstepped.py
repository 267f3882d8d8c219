"""Attention modules that call posenc's attention function without a step, noted while the probe runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_strays: ContextVar[list[nn.Module] | None] = ContextVar("posenc_strays", default=None)


@contextmanager
def logged_strays() -> Iterator[list[nn.Module]]:
    """Note every module that calls posenc's attention function without a step."""
    found: list[nn.Module] = []
    token = _strays.set(found)
    try:
        yield found
    finally:
        _strays.reset(token)


def note_stray(module: nn.Module) -> None:
    """Called by the attention function when no step reached it."""
    strays = _strays.get()
    if strays is not None:
        strays.append(module)


def probing() -> bool:
    """Whether somebody listens."""
    return _strays.get() is not None
