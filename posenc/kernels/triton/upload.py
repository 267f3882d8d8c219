"""Arrays to the device, without waiting for what runs there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNED = 16
"""Bytes to whose multiples packed arrays are moved."""


def uploaded(array: NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def uploaded_together(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Several arrays on the device, in order: they share one copy to it, and one allocation there."""
    arrays = [np.ascontiguousarray(array) for array in arrays]
    starts = np.cumsum([0, *(-array.nbytes // ALIGNED * -ALIGNED for array in arrays)])
    packed = np.zeros(max(ALIGNED, int(starts[-1])), dtype=np.uint8)
    for start, array in zip(starts, arrays, strict=False):
        packed[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    moved = uploaded(packed, device)
    return [
        moved[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for start, array in zip(starts.tolist(), arrays, strict=False)
    ]
