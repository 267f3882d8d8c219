"""Collect the attention modules that call posenc's attention function without a step, while the probe runs.

The probe forwards the step to these modules by hooks (``posenc/hf/step_forwarding.py``), or refuses the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_unstepped: ContextVar[list[nn.Module] | None] = ContextVar("posenc_unstepped", default=None)


@contextmanager
def unstepped_modules() -> Iterator[list[nn.Module]]:
    """Collect every module that calls posenc's attention function without a step inside the block, in this thread."""
    modules: list[nn.Module] = []
    token = _unstepped.set(modules)
    try:
        yield modules
    finally:
        _unstepped.reset(token)


def note_unstepped(module: nn.Module) -> None:
    """Add a module to the collection of this thread, if there is one; called when no step reaches it."""
    modules = _unstepped.get()
    if modules is not None:
        modules.append(module)


def probing() -> bool:
    """Return whether the probe runs in this thread."""
    return _unstepped.get() is not None
