"""The calls of torch's CPU flash operator that a plan needs.

::

    plan        segments: a key interval per query, and positions
      |         rotation_layout: queries rotated once per segment, keys once per map
    segment
      |         tiles_of: rectangles, triangles and blocks of bands
    FlashCall   its queries, keys and values as views; tiles that repeat along the diagonal are one batched call
      |         the operator: output and logsumexp of the tile
    output      merged in place by logsumexp; the first call of a row is copied

Shape letters: B batch, G batch rows x heads, N blocks of a tile, L tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posenc.kernels.cpu.tiles import Tile, tiles_of
from posenc.kernels.intervals import BLOCK_ROWS
from posenc.kernels.rotated import QueryCopy, rotation_layout
from posenc.plan import PositionPlan


@dataclass(frozen=True)
class FlashCall:
    """One call of the operator: a tile of a segment.

    Parameters
    ----------
    key_copy : int
        The rotated keys that it attends, by their number in the layout.
    tile : Tile
        Its queries, counted from ``row_offset``, and its keys, counted from ``key_offset``.
    row_offset, key_offset : int
        The segment's first query among all queries, and the copy's first key among all keys.
    first : bool
        No earlier call wrote any of its rows.
    mask : bool [1, 1, rows, keys] or None
        Pairs of a block that are attended; None where the kind of the tile says it.
    """

    key_copy: int
    tile: Tile
    row_offset: int
    key_offset: int
    first: bool
    mask: Tensor | None

    @property
    def is_causal(self) -> bool:
        """Whether the operator's own causal mask is that of the tile."""
        return self.tile.kind == "lower"

    def rows(self, x_GLD: Tensor) -> Tensor:
        """This call's queries of a tensor over all queries, as a view [N, G, L, D]."""
        return _blocks(x_GLD, self.tile.rows, self.tile, self.row_offset)

    def queries(self, x_GLD: Tensor) -> Tensor:
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
class FlashCalls:
    """All calls of a plan.

    Parameters
    ----------
    by_segment : tuple of tuple of FlashCall
        Those of each segment that the layout has queries of.
    complete : bool
        The first calls of all rows leave none out, so that the output need not be cleared before.
    """

    by_segment: tuple[tuple[FlashCall, ...], ...]
    complete: bool


def flash_calls(plan: PositionPlan, q_len: int) -> FlashCalls:
    """The calls for the last ``q_len`` queries, worked out once per plan and shared by all layers."""
    return plan.derived(_calls, q_len, None)


def masked_calls(plan: PositionPlan, mask_11LL: Tensor) -> FlashCalls:
    """Calls under one batch row's mask: blocks of queries, each against the keys that one of them may attend."""
    return _calls(plan, mask_11LL.shape[2], mask_11LL)


def _calls(plan: PositionPlan, q_len: int, mask_11LL: Tensor | None) -> FlashCalls:
    layout, written = rotation_layout(plan, q_len), _WrittenRows(q_len)
    by_segment = []
    for copy in layout.queries:
        first, offset, calls = copy.rows.start, layout.keys[copy.key_copy].keys.start, []
        tiles = tiles_of(copy.key_start, copy.key_stop) if mask_11LL is None else _query_blocks(copy)
        for tile in tiles:
            mask = _interval_mask(copy, tile) if tile.kind == "masked" else None
            if mask is not None and mask_11LL is not None:
                (row, row_stop), (key, key_stop) = tile.rows, tile.keys
                mask = mask & mask_11LL[:, :, first + row : first + row_stop, offset + key : offset + key_stop]
            is_first = written.add(slice(first + tile.row_span.start, first + tile.row_span.stop))
            calls.append(FlashCall(copy.key_copy, tile, first, offset, is_first, mask))
        by_segment.append(tuple(calls))
    return FlashCalls(tuple(by_segment), written.complete)


def _query_blocks(copy: QueryCopy) -> list[Tile]:
    """The queries of a segment in blocks, each against all keys that lie in one of its intervals."""
    tiles, rows = [], len(copy.key_start)
    for low in range(0, rows, BLOCK_ROWS):
        high = min(low + BLOCK_ROWS, rows)
        start, stop = copy.key_start[low:high], copy.key_stop[low:high]
        live = stop > start
        if live.any():
            tiles.append(Tile("masked", (low, high), (int(start[live].min()), int(stop[live].max()))))
    return tiles


class _WrittenRows:
    """Which rows of the output the calls so far have written."""

    def __init__(self, q_len: int) -> None:
        self._written: NDArray[np.bool_] = np.zeros(q_len, dtype=bool)
        self._overlaps = False

    def add(self, rows: slice) -> bool:
        """Note a call that writes some rows; whether it is the first for all of them."""
        before = self._written[rows]
        first = not before.any()
        self._overlaps |= not first and not before.all()
        self._written[rows] = True
        return first

    @property
    def complete(self) -> bool:
        """Whether every row is written, and no call met both written and unwritten rows."""
        return bool(self._written.all()) and not self._overlaps


def _interval_mask(copy: QueryCopy, tile: Tile) -> Tensor:
    """Pairs of a tile's first block that lie inside the intervals, bool [1, 1, rows, keys]."""
    rows, keys = slice(*tile.rows), np.arange(*tile.keys)
    inside = (keys >= copy.key_start[rows, None]) & (keys < copy.key_stop[rows, None])
    return torch.from_numpy(inside)[None, None]


def _blocks(x_GLD: Tensor, span: tuple[int, int], tile: Tile, offset: int) -> Tensor:
    """The blocks of a tile, [N, G, L, D], of which the first one takes the tokens ``span``, counted from ``offset``."""
    first, size = offset + span[0], span[1] - span[0]
    if tile.count == 1:
        return x_GLD[None, :, first : first + size]
    covered = x_GLD[:, first : first + size + (tile.count - 1) * tile.step]
    return covered.unfold(1, size, tile.step).permute(1, 0, 3, 2)
