"""cos and sin of positions on the device, as the Triton kernels look them up.

Positions of all built-in strategies are whole numbers, so one table by position serves every segment, plan and
request of the same frequencies: 8 F bytes per position (16 MB for 32,768 positions of a 128-wide head), and 4 bytes
for every key of a map. Fractions, and positions of their own for every frequency, get a table by token: 8 F bytes for
every key of a map.

Shape letters: L tokens, F rotary frequencies, R rows of a table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posenc.kernels.memo import remembered
from posenc.rope import Rotary
from posenc.segment import Interpolation, Positions, Segment

LEAST = 4096
"""Positions that a table has at least: it is made anew when it is outgrown."""

SPARSE = 4
"""A table by position that has this many times the rows of a table by token is not worth it."""


@dataclass(frozen=True, eq=False)
class Angles:
    """cos and sin float32 [R, F], and which row is whose, int32 [L]."""

    cos_RF: Tensor
    sin_RF: Tensor
    rows_L: Tensor

    def of(self, rows: slice) -> Angles:
        """The angles of some of the tokens."""
        return Angles(self.cos_RF, self.sin_RF, self.rows_L[rows])

    @property
    def bytes(self) -> int:
        """Memory of the tables, which others may share, and of the rows."""
        return sum(x.numel() * x.element_size() for x in (self.cos_RF, self.sin_RF, self.rows_L))


def key_angles(segment: Segment, rotary: Rotary, device: torch.device) -> tuple[Angles, int]:
    """The angles of the keys of the segment that this one is a slice of, and where the slice starts."""
    root, offset = segment.origin or (segment, 0)
    key = ("triton keys", rotary, str(device))
    found = remembered(
        root.memo, key, lambda: angles(root.key_positions, rotary, device, interpolation=root.interpolation)
    )
    return found, offset


def angles(
    positions: Positions, rotary: Rotary, device: torch.device, *, interpolation: Interpolation = "positions"
) -> Angles:
    """The angles of some positions, [L] or [L, F]."""
    whole = whole_positions(positions)
    if whole is not None and len(whole):
        low, high = min(0, int(whole.min())), int(whole.max()) + 1
        if high - low <= max(LEAST, SPARSE * len(whole)):
            cos_RF, sin_RF, first = _by_position(rotary, low, high, device)
            return Angles(cos_RF, sin_RF, _upload((whole - first).astype(np.int32), device))
    tables = rotary.tables(positions, interpolation=interpolation, device=device)
    return Angles(*tables, torch.arange(len(positions), dtype=torch.int32, device=device))


def whole_positions(positions: Positions) -> NDArray[np.int64] | None:
    """Positions [L] as integers, or None where one is a fraction or every frequency has its own."""
    if positions.ndim > 1:
        return None
    if positions.dtype.kind in "iu":
        return positions.astype(np.int64, copy=False)
    whole: NDArray[np.int64] = positions.astype(np.int64)
    return whole if np.array_equal(whole, positions) else None


def _by_position(rotary: Rotary, low: int, high: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """cos and sin [R, F] of the positions from ``first <= low`` on, ``high - 1`` included, and ``first``.

    The table belongs to the rotary and grows; whoever uses an older one keeps that alive.
    """
    key = ("triton positions", rotary.key, str(device))
    known: tuple[Tensor, Tensor, int] | None = rotary.memo.get(key)
    if known is not None:
        if known[2] <= low and high <= known[2] + len(known[0]):
            return known
        low, high = min(low, known[2]), max(high, known[2] + len(known[0]))
        rotary.memo.pop(key, None)
    first, stop = -_roomy(-low), _roomy(high)
    return remembered(rotary.memo, key, lambda: (*rotary.tables(np.arange(first, stop), device=device), first))


def _roomy(count: int) -> int:
    """The next power of two from ``LEAST`` on, 0 for 0."""
    return max(LEAST, 1 << (count - 1).bit_length()) if count > 0 else 0


def _upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """To the device, without waiting for what runs there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
