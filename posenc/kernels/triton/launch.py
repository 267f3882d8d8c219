"""Launch options of the Triton kernels on the GPU at hand: warps, stages, and how many programs fill it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from posenc.kernels.triton.mode import INTERPRETED
from posenc.kernels.triton.primitives import Shape
from posenc.kernels.triton.tiles import Tiling

RESERVED = 2048
"""Bytes of shared memory that the compiler uses for barriers and reductions."""


def launch_options(tiling: Tiling, shape: Shape, like: Tensor) -> dict[str, int]:
    """``num_warps`` and ``num_stages`` of a kernel whose tiles hold elements like those of a tensor."""
    if INTERPRETED:
        return {}
    stages = stages_that_fit(tiling, shape, like.element_size(), shared_memory(like.device))
    return {"num_warps": tiling.warps, "num_stages": stages}


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; for the interpreter, enough to make splits."""
    return 8 if INTERPRETED else int(_properties(device).multi_processor_count)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block can have."""
    return int(_properties(device).shared_memory_per_block_optin)


def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def stages_that_fit(tiling: Tiling, shape: Shape, itemsize: int, most_bytes: int) -> int:
    """``num_stages``: that of the tiling, or as many stages as shared memory holds beside the queries.

    Parameters
    ----------
    itemsize, most_bytes : int
        Bytes of an element, and of the shared memory of a block.
    """
    block = tiling.keys * (shape.width + shape.value_tile) * itemsize
    free = most_bytes - tiling.rows * shape.width * itemsize - RESERVED
    return max(1, min(tiling.stages, free // block))
