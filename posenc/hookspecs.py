"""The four hooks a plugin may implement. Name its module in the entry-point group ``posenc``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from posenc.adapter import ArchitectureAdapter
    from posenc.backend import AttentionBackend
    from posenc.positions import PositionStrategy

GROUP = "posenc"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def posenc_register_strategies(register: Callable[[type[PositionStrategy]], None]) -> None:
    """Call ``register(cls)`` for every strategy class the plugin offers."""


@hookspec
def posenc_register_adapters(register: Callable[[ArchitectureAdapter], None]) -> None:
    """Call ``register(adapter)`` for every model family the plugin serves."""


@hookspec
def posenc_register_backends(register: Callable[[AttentionBackend], None]) -> None:
    """Call ``register(backend)`` for every attention backend the plugin offers."""


@hookspec
def posenc_register_tasks(register: Callable[[type[Any]], None]) -> None:
    """Call ``register(cls)`` for every subclass of ``posenc.evaluate.tasks.base.Task`` the plugin offers."""
