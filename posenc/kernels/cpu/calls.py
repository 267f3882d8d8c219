"""The kernel calls of a plan on torch's CPU flash operator: which tile of which segment reads what.

::

    plan       segments: a key interval per query, and positions
      |        layout: queries rotated once per segment, keys once per map
    segment
      |        tile: rectangles, triangles and blocks of bands
    Call       its queries, keys and values as views; tiles that repeat along the diagonal are one batched call
      |        the operator: output and logsumexp of the tile
    output     merged in place by logsumexp; the first call of a row is copied

Shape letters: B batch, G batch rows x heads, N blocks of a tile, L tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posenc.kernels.cpu.tiles import MASKED_ROWS, Tile, tile
from posenc.kernels.rotated import Work, layout
from posenc.plan import PositionPlan


@dataclass(frozen=True)
class Call:
    """One kernel call: a tile of a segment.

    Parameters
    ----------
    copy : int
        The rotated keys it reads.
    tile : Tile
        Its queries, counted from ``row_offset``, and its keys, counted from ``key_offset``.
    first : bool
        No earlier call wrote any of its rows.
    mask : bool [1, 1, rows, keys] or None
        Pairs of a block that are attended.
    """

    copy: int
    tile: Tile
    row_offset: int
    key_offset: int
    first: bool
    mask: Tensor | None

    def rows(self, x_GLD: Tensor) -> Tensor:
        """This call's queries of a tensor over all queries, as a view [N, G, L, D]."""
        return _blocks(x_GLD, self.tile.rows, self.tile, self.row_offset)

    def own_rows(self, x_GLD: Tensor) -> Tensor:
        """This call's queries of its segment's rotated copy."""
        return _blocks(x_GLD, self.tile.rows, self.tile, 0)

    def keys(self, x_GLD: Tensor) -> Tensor:
        """This call's keys of its rotated copy; blocks may overlap."""
        return _blocks(x_GLD, self.tile.keys, self.tile, 0)

    def values(self, x_GLD: Tensor) -> Tensor:
        """This call's values of a tensor over all keys; blocks may overlap."""
        return _blocks(x_GLD, self.tile.keys, self.tile, self.key_offset)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """The mask in the form that is added to the logits."""
        if self.mask is None:
            return None
        return torch.zeros(self.mask.shape, dtype=dtype).masked_fill_(~self.mask, float("-inf"))

    def empty_rows(self) -> Tensor | None:
        """Rows of a block that attend nothing, bool [1, 1, rows], or None where there are none."""
        if self.mask is None:
            return None
        empty = ~self.mask.any(-1)
        return empty if bool(empty.any()) else None


@dataclass(frozen=True)
class Calls:
    """The calls of every segment; ``complete`` where the first calls of all rows leave none out."""

    by_work: tuple[tuple[Call, ...], ...]
    complete: bool


class _Draft:
    """Collects calls and notes which rows have been written."""

    def __init__(self, q_len: int) -> None:
        self.touched: NDArray[np.bool_] = np.zeros(q_len, dtype=bool)
        self.by_work: list[tuple[Call, ...]] = []
        self.overlaps = False

    def call(self, work: Work, piece: Tile, key_offset: int, mask: Tensor | None) -> Call:
        rows = slice(work.rows.start + piece.row_span.start, work.rows.start + piece.row_span.stop)
        written = self.touched[rows]
        first = not written.any()
        self.overlaps |= not first and not written.all()
        self.touched[rows] = True
        return Call(work.copy, piece, work.rows.start, key_offset, first, mask)

    def done(self) -> Calls:
        return Calls(tuple(self.by_work), bool(self.touched.all()) and not self.overlaps)


def plan_calls(plan: PositionPlan, q_len: int) -> Calls:
    """The calls for the last ``q_len`` queries, worked out once per plan and shared by every layer."""
    return plan.derived(_plan_calls, q_len)


def _plan_calls(plan: PositionPlan, q_len: int) -> Calls:
    draft, arranged = _Draft(q_len), layout(plan, q_len)
    for work in arranged.work:
        offset = arranged.copies[work.copy].keys.start
        draft.by_work.append(
            tuple(
                draft.call(work, piece, offset, _interval_mask(work, piece) if piece.kind == "masked" else None)
                for piece in tile(work.key_start, work.key_stop)
            )
        )
    return draft.done()


def masked_calls(plan: PositionPlan, mask_11LL: Tensor) -> Calls:
    """Calls under one row's mask: blocks of queries against the keys that any of them may see."""
    q_len = mask_11LL.shape[2]
    draft, arranged = _Draft(q_len), layout(plan, q_len)
    for work in arranged.work:
        offset, calls = arranged.copies[work.copy].keys.start, []
        rows = len(work.key_start)
        for low in range(0, rows, MASKED_ROWS):
            high = min(low + MASKED_ROWS, rows)
            live = (work.key_stop > work.key_start)[low:high]
            if not live.any():
                continue
            keys = int(work.key_start[low:high][live].min()), int(work.key_stop[low:high][live].max())
            piece, row = Tile("masked", (low, high), keys), work.rows.start
            given = mask_11LL[:, :, row + low : row + high, offset + keys[0] : offset + keys[1]]
            calls.append(draft.call(work, piece, offset, _interval_mask(work, piece) & given))
        draft.by_work.append(tuple(calls))
    return draft.done()


def _interval_mask(work: Work, piece: Tile) -> Tensor:
    """Pairs of a masked tile that lie inside the intervals, bool [1, 1, rows, keys]."""
    rows, (low, high) = slice(*piece.rows), piece.keys
    keys = np.arange(low, high)
    inside = (keys >= work.key_start[rows, None]) & (keys < work.key_stop[rows, None])
    return torch.from_numpy(inside)[None, None]


def _blocks(x_GLD: Tensor, span: tuple[int, int], shape: Tile, offset: int) -> Tensor:
    first, size = offset + span[0], span[1] - span[0]
    if shape.count == 1:
        return x_GLD[None, :, first : first + size]
    covered = x_GLD[:, first : first + size + (shape.count - 1) * shape.step]
    return covered.unfold(1, size, shape.step).permute(1, 0, 3, 2)
