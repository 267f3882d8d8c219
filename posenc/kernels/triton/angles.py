"""cos and sin of positions on the device, as the Triton kernels look them up or compute them.

The positions of nearly all built-in strategies are whole numbers, 4 bytes for every key of a map. Decoding over raw
keys computes their angles; rows that are rotated beforehand look them up in one table by position, which serves every
segment, plan and request of the same frequencies: 8 F bytes per position (16 MB for 32,768 positions of a 128-wide
head). Fractions, and positions per frequency, get a table by token: 8 F bytes for every key of a map.

Shape letters: L tokens, F rotary frequencies, R rows of a table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posenc.derived import ordinary_tensors
from posenc.kernels.triton.upload import uploaded
from posenc.rope import Rotary
from posenc.segment import Interpolation, Positions, Segment

LEAST = 4096
"""Fewest positions of a table; one that is too small is replaced by a larger one."""

SPARSE = 4
"""A table by position may have this many times the rows of a table by token; beyond that, the latter is made."""

STEPS = 2**32
"""Steps of a turn, as many as an int32 has values, so that a product of int32 drops whole turns."""

RADIANS_PER_STEP = 2 * math.pi / STEPS


def turns(rotary: Rotary, device: torch.device) -> tuple[Tensor, Tensor]:
    """The frequencies in steps of a turn per token, int32 [F], and the rest of each in radians per token, float32 [F].

    The angle of a whole position ``p`` is ``p * turns * RADIANS_PER_STEP + p * rest``: with the first product in int32,
    that is within 1e-6 of the angle less whole turns, for any int32 ``p`` (the rest is at most half a step).
    """
    return rotary.derived(_turns, device)


def _turns(rotary: Rotary, device: torch.device) -> tuple[Tensor, Tensor]:
    steps_F = rotary.inv_freq.detach().double().cpu().numpy() / RADIANS_PER_STEP
    whole_F = np.rint(steps_F)
    rest_F = ((steps_F - whole_F) * RADIANS_PER_STEP).astype(np.float32)
    turns_F = (whole_F % STEPS).astype(np.uint32).view(np.int32)
    return uploaded(turns_F, device), uploaded(rest_F, device)


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
    """The angles of the keys of the root that a segment is a slice of, and where the slice starts."""
    root, offset = segment.root
    return root.derived(_key_angles, rotary, device), offset


def _key_angles(segment: Segment, rotary: Rotary, device: torch.device) -> Angles:
    return angles(segment.key_positions, rotary, device, interpolation=segment.interpolation)


def whole_key_positions(segment: Segment, device: torch.device) -> Tensor | None:
    """The positions of a segment's keys, int32 [L], a slice of its root's; None unless all are whole numbers."""
    root, offset = segment.root
    positions_L = root.derived(_whole_key_positions, device)
    return None if positions_L is None else positions_L[offset:]


def _whole_key_positions(segment: Segment, device: torch.device) -> Tensor | None:
    whole = whole_positions(segment.key_positions)
    if whole is None or (len(whole) and max(-int(whole.min()), int(whole.max())) >= STEPS // 2):
        return None
    return uploaded(whole.astype(np.int32), device)


def angles(
    positions: Positions, rotary: Rotary, device: torch.device, *, interpolation: Interpolation = "positions"
) -> Angles:
    """The angles of some positions, [L] or [L, F]."""
    whole = whole_positions(positions)
    if whole is not None and len(whole):
        low, high = min(0, int(whole.min())), int(whole.max()) + 1
        if high - low <= max(LEAST, SPARSE * len(whole)):
            cos_RF, sin_RF, first = rotary.derived(_position_table, device).covering(low, high, rotary)
            return Angles(cos_RF, sin_RF, uploaded((whole - first).astype(np.int32), device))
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


@dataclass(eq=False)
class _PositionTable:
    """cos and sin of whole positions on a device; a table that is outgrown stays valid for those who use it."""

    device: torch.device
    table: tuple[Tensor, Tensor, int] | None = None
    """cos and sin, float32 [R, F], and the position of their first row."""

    def covering(self, low: int, high: int, rotary: Rotary) -> tuple[Tensor, Tensor, int]:
        """A table of the positions ``low .. high - 1``, and of others."""
        table = self.table
        if table is not None:
            cos_RF, _, first = table
            if first <= low and high <= first + len(cos_RF):
                return table
            low, high = min(low, first), max(high, first + len(cos_RF))
        self.table = None  # frees its memory before more is taken
        first, stop = -_roomy(-low), _roomy(high)
        with ordinary_tensors():
            self.table = table = (*rotary.tables(np.arange(first, stop), device=self.device), first)
        return table


def _position_table(rotary: Rotary, device: torch.device) -> _PositionTable:
    return _PositionTable(device)


def _roomy(count: int) -> int:
    """The next power of two from ``LEAST`` on, 0 for 0."""
    return max(LEAST, 1 << (count - 1).bit_length()) if count > 0 else 0
