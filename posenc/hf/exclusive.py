"""Make sure that no strategy is applied to or removed from a model while the model runs.

A running forward would see half of the change: its rotary tables, masks and keyword arguments were made at the start,
while each layer looks up its attention function when it gets there. So a change first installs a gate, which refuses
forwards that start in other threads, and then looks for forwards that already run.
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
"""Names of the functions that run a model: torch's module call, the forward, and transformers' generation loop."""


class Gate:
    """A forward pre-hook that refuses every thread but the one that made it.

    Raises
    ------
    ModelBusyError
        In any other thread.
    """

    def __init__(self) -> None:
        self.owner = threading.get_ident()

    def __call__(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self.owner:
            raise ModelBusyError(
                f"another thread is applying a strategy to this {type(module).__name__} or removing one: "
                "run the model again when it is done."
            )


@contextmanager
def exclusive(model: nn.Module, decoder: nn.Module, what: str) -> Iterator[None]:
    """Change a model inside the block, in which no other thread runs or changes it.

    Parameters
    ----------
    model, decoder : Module
        The model and its decoder, which gets the gate.
    what : str
        The change, for the message: ``cannot {what}``.

    Raises
    ------
    ModelBusyError
        If the model runs or is being changed in another thread, or in a caller of this block.
    """
    gate = Gate()
    hook = decoder.register_forward_pre_hook(gate, prepend=True)
    try:
        others = [
            other for other in decoder._forward_pre_hooks.values() if isinstance(other, Gate) and other is not gate
        ]
        if others or _is_running(model, decoder):
            state = "changed" if others else "run"
            raise ModelBusyError(
                f"cannot {what}: {type(model).__name__} is being {state} elsewhere (another "
                "thread, or a callback inside the forward). Nothing was changed. Wait until it is done, then try again."
            )
        yield
    finally:
        hook.remove()


def _is_running(model: nn.Module, decoder: nn.Module) -> bool:
    this_thread = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        current: FrameType | None = frame
        while current is not None:
            if current.f_code.co_name in RUNNING:
                runner = current.f_locals.get("self")
                if runner is model or runner is decoder:
                    return True
                if (
                    thread != this_thread
                    and isinstance(runner, nn.Module)
                    and any(m is decoder for m in runner.modules())
                ):
                    return True
            current = current.f_back
    return False
