"""No strategy is put on or taken off a model while somebody runs it.

A forward that is under way has the one half of a change behind it and the other before it: its rotary tables, its
masks and its keyword arguments were made at the start, and each layer looks its attention function up when it gets
there. So a change first puts up a gate, which turns away forwards that start now in other threads, and then looks
for forwards that are under way already.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn

from posenc.errors import ModelBusyError

RUNNING = ("_call_impl", "forward", "generate")
"""Functions in whose frames a model is run: torch's module call, and transformers' loops between forwards."""


class Gate:
    """A forward pre-hook that turns away every other thread."""

    def __init__(self) -> None:
        self.owner = threading.get_ident()

    def __call__(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self.owner:
            raise ModelBusyError(
                f"another thread is just applying or removing a strategy on this {type(module).__name__}: "
                "run the model again when it is done."
            )


@contextmanager
def exclusive(model: nn.Module, decoder: nn.Module, what: str) -> Iterator[None]:
    """Change a model in here: nobody runs it, and nobody else changes it.

    Raises
    ------
    ModelBusyError
        If the model runs, or is being changed, in another thread, or in a frame of this one that waits for us.
    """
    gate = Gate()
    hook = decoder.register_forward_pre_hook(gate, prepend=True)
    try:
        others = [h for h in decoder._forward_pre_hooks.values() if isinstance(h, Gate) and h is not gate]
        if others or _is_running(model, decoder):
            raise ModelBusyError(
                f"cannot {what}: {type(model).__name__} is being {'changed' if others else 'run'} elsewhere (another "
                "thread, or a callback inside the forward). Nothing was changed. Wait until it is done, then try again."
            )
        yield
    finally:
        hook.remove()


def _is_running(model: nn.Module, decoder: nn.Module) -> bool:
    own = threading.get_ident()
    for ident, frame in sys._current_frames().items():
        current: FrameType | None = frame
        while current is not None:
            if current.f_code.co_name in RUNNING:
                runner = current.f_locals.get("self")
                if runner is model or runner is decoder:
                    return True
                if ident != own and isinstance(runner, nn.Module) and any(m is decoder for m in runner.modules()):
                    return True
            current = current.f_back
    return False
