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
    from posenc.kernels.cpu_flash import CpuFlashBackend
    from posenc.kernels.flash_attn_4 import FlashAttention4Backend
    from posenc.kernels.reference import ReferenceBackend
    from posenc.kernels.torch_flash import TorchFlashBackend
    from posenc.kernels.triton_backend import TritonBackend
    from posenc.kernels.xformers_segments import XformersBackend

    register(ReferenceBackend())
    register(CpuFlashBackend())
    register(XformersBackend())
    register(TorchFlashBackend())
    register(TritonBackend())
    register(FlashAttention4Backend())
