"""Attention under ``torch.autocast``: inputs are cast as torch's own attention casts them, but nothing inside is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def as_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value in the dtype in which ``F.scaled_dot_product_attention`` would take them here.

    Under ``torch.autocast`` that is its dtype for every tensor of less than float64; without, they stay as they are.
    """
    device = q.device.type
    if not _is_on(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which torch casts nothing, because a backend chooses the precision of its products itself."""
    return torch.autocast(device.type, enabled=False) if _is_on(device.type) else nullcontext()


def _is_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
