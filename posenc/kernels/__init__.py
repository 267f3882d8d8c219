"""Built-in attention backends, registered as a third party's would be."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from posenc.hookspecs import hookimpl

if TYPE_CHECKING:
    from posenc.backend import AttentionBackend


@hookimpl
def posenc_register_backends(register: Callable[[AttentionBackend], None]) -> None:
    """Register the built-in backends."""
    from posenc.kernels.cpu.backend import CpuFlashBackend
    from posenc.kernels.reference import ReferenceBackend
    from posenc.kernels.triton.backend import TritonBackend
    from posenc.kernels.windowed.flash_attn_4 import FlashAttention4Backend
    from posenc.kernels.windowed.torch_flash import TorchFlashBackend
    from posenc.kernels.windowed.xformers import XformersBackend

    register(ReferenceBackend())
    register(CpuFlashBackend())
    register(XformersBackend())
    register(TorchFlashBackend())
    register(TritonBackend())
    register(FlashAttention4Backend())
