"""The backend ``flash_attn_4``: windowed calls of FlashAttention-4 on Hopper and Blackwell.

Install it with ``pip install 'posenc[flash-attn-4]'``. On both architectures its forward takes a window and returns the
logsumexp. This was read in 4.0.0b36, a beta; in other releases the parameters that are used here are looked for first.
The library compiles a kernel on first use, in seconds: one for every kind of window, head_dim and group of heads, but
none for other lengths or widths of windows. On Hopper it does not split the keys of a query over the GPU, so decoding
leaves most of the GPU idle.

Shape letters: B batch, H heads, R queries and K keys of one call, D head_dim.
"""

from __future__ import annotations

import inspect
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from posenc.kernels.windowed.backend import ALIGNMENT, OutLse, WindowedBackend, padded_width

HOME = "flash_attn.cute"

NEEDED = ("softmax_scale", "window_size", "return_lse")
"""The parameters of its function that are used besides query, key and value."""

MAJORS = (9, 10, 11)
"""Compute capabilities that it has kernels of its own for; elsewhere it runs the design that torch has already."""


@cache
def find_forward() -> tuple[Any, str]:
    """The library's function and "", or None and why there is none."""
    try:
        function = import_module(HOME).flash_attn_func
    except Exception as error:  # its compiler is a package of its own, made for one CUDA
        return None, f"{type(error).__name__}: {error}"
    missing = [name for name in NEEDED if name not in inspect.signature(function).parameters]
    return (None, f"its flash_attn_func takes no {missing[0]}") if missing else (function, "")


class FlashAttention4Backend(WindowedBackend):
    """One FlashAttention-4 call per band, which serves grouped heads itself."""

    name = "flash_attn_4"
    summary = "FlashAttention-4 on windows (Hopper, Blackwell), merged by logsumexp"
    priority = 4  # below all others on a GPU until one has measured it

    @property
    def forward(self) -> Any:
        """``flash_attn_func`` of the library."""
        return find_forward()[0]

    def refuses(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None) -> str | None:
        """Also where this GPU's kernel does not take heads of this width."""
        reason = super().refuses(q_BHLD, k_BHLD, v_BHLD, mask)
        return reason or self.unfit(q_BHLD.device, padded_width(q_BHLD, v_BHLD))

    def unavailable(self, q_BHLD: Tensor) -> str | None:
        """Also where the library cannot be imported."""
        if self.forward is None:
            return f"FlashAttention-4 cannot be imported ({find_forward()[1]}): pip install 'posenc[flash-attn-4]'"
        return None

    def unfit(self, device: torch.device, width: int) -> str | None:
        """Why the kernel for this GPU does not take heads of this width, if it does not."""
        return _unfit(*torch.cuda.get_device_capability(device), width)

    def window(
        self, q_BRHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, *, left: int | None, right: int | None, scale: float
    ) -> OutLse:
        out, lse = self.forward(q_BRHD, k_BKHD, v_BKHD, softmax_scale=scale, window_size=(left, right), return_lse=True)
        return out, lse


@cache
def _unfit(major: int, minor: int, width: int) -> str | None:
    """Why the library's kernel for this GPU does not take heads of this width, from its own check."""
    if major not in MAJORS:
        return f"FlashAttention-4 is for compute capability 9, 10 and 11, and this GPU has {major}.{minor}"
    try:
        import_module(f"{HOME}.interface")._validate_head_dims(width, width, major, ALIGNMENT)
    except AssertionError as error:
        return f"FlashAttention-4 refuses: {error}"
    return None
