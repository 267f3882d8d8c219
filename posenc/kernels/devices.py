"""What a kernel launch on a GPU needs: the right current device, and tensors that the kernel can load."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

LOADED = 16
"""Bytes of one load. A tensor, and each of its rows, has to begin at a multiple of them."""


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one for a block: kernels that are not torch's own are launched there.

    With ``device_map="auto"`` the layers of one model lie on several GPUs.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether launches are being recorded in a CUDA graph, where nothing may wait for the GPU."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def loadable(x: Tensor) -> bool:
    """Whether channels are side by side, and every row of them begins at a multiple of 16 bytes."""
    strides = (stride * x.element_size() for stride in x.stride()[:-1])
    return x.stride(-1) == 1 and not any(start % LOADED for start in (x.data_ptr(), *strides))


def aligned(x: Tensor) -> Tensor:
    """The tensor where it is loadable, else a contiguous copy."""
    # contiguous() would keep the strides of dimensions of one.
    return x if loadable(x) else x.clone(memory_format=torch.contiguous_format)
