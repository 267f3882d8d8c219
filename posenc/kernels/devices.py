"""Launching on the GPU that holds the tensors, which need not be the current one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one for a block: kernels that are not torch's own are launched there.

    The layers of one model lie on several where ``device_map="auto"`` puts them.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether what is launched now is recorded in a CUDA graph, where nothing may wait for the GPU."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
