"""Attention modules that call posenc's attention function without a step, noted while the probe runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_noted: ContextVar[list[nn.Module] | None] = ContextVar("posenc_unstepped", default=None)


@contextmanager
def unstepped_modules() -> Iterator[list[nn.Module]]:
    """Note every module that calls posenc's attention function without a step."""
    modules: list[nn.Module] = []
    token = _noted.set(modules)
    try:
        yield modules
    finally:
        _noted.reset(token)


def note_unstepped(module: nn.Module) -> None:
    """Called by the attention function when no step reached it."""
    modules = _noted.get()
    if modules is not None:
        modules.append(module)


def probing() -> bool:
    """Whether the probe runs in this thread."""
    return _noted.get() is not None
