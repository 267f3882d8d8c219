"""Built-in architecture adapters, registered as a third party's would be."""

from __future__ import annotations

from collections.abc import Callable

from posenc.adapter import ArchitectureAdapter
from posenc.hookspecs import hookimpl

LLAMA = ArchitectureAdapter("llama", "Llama 1 to 3 and models that share its code", ("llama",))
MISTRAL = ArchitectureAdapter("mistral", "Mistral, with and without sliding window", ("mistral",))
QWEN = ArchitectureAdapter("qwen", "Qwen2 and Qwen3, sliding layers included", ("qwen2", "qwen3"))


@hookimpl
def posenc_register_adapters(register: Callable[[ArchitectureAdapter], None]) -> None:
    """Register the built-in adapters."""
    for adapter in (LLAMA, MISTRAL, QWEN):
        register(adapter)
