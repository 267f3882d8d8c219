"""Built-in architecture adapters, registered in the same way as those of a third party."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from posenc.hookspecs import hookimpl

if TYPE_CHECKING:
    from posenc.adapter import ArchitectureAdapter


@hookimpl
def posenc_register_adapters(register: Callable[[ArchitectureAdapter], None]) -> None:
    """Register the built-in adapters."""
    from posenc_adapters.families import FAMILIES

    for adapter in FAMILIES:
        register(adapter)
