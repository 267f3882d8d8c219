"""Cut the region of a segment into few rectangles and triangles that a causal kernel runs without masks.

Along the queries, both interval bounds move in straight runs: each stands still or advances by one
key per query. A run is a rectangle plus at most two triangles; the runs of a long band repeat one
pair of triangles, which one batched call computes. Only irregular intervals need masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from posenc.plan import IntArray

Kind = Literal["full", "lower", "upper", "masked"]

MASKED_ROWS = 128
"""Queries per masked tile: wide enough for the kernel, small enough that the mask stays in cache."""

SHORT_RUN = 8
"""Runs shorter than this are pooled into masked tiles."""


@dataclass(frozen=True)
class Tile:
    """A block of queries against a block of keys, repeated along the diagonal.

    Parameters
    ----------
    kind : {"full", "lower", "upper", "masked"}
        Which pairs ``(r, c)`` of the block are attended: all, ``c <= r``, ``c >= r``, or those inside
        the queries' own intervals.
    rows, keys : (int, int)
        Half-open ranges of the first block.
    count : int
        Number of blocks; block ``b`` is shifted by ``b * step`` queries and keys.
    step : int
        Distance between blocks in tokens.
    """

    kind: Kind
    rows: tuple[int, int]
    keys: tuple[int, int]
    count: int = 1
    step: int = 0

    @property
    def row_span(self) -> slice:
        """Queries covered by all blocks."""
        return slice(self.rows[0], self.rows[1] + (self.count - 1) * self.step)


def tile(key_start: IntArray, key_stop: IntArray) -> list[Tile]:
    """Tiles that cover ``{(r, c): key_start[r] <= c < key_stop[r]}`` exactly once.

    Parameters
    ----------
    key_start, key_stop : int64 [rows]
        Non-decreasing bounds, one interval per query; empty where ``key_start >= key_stop``.
    """
    tiles: list[Tile] = []
    pending: list[int] = []  # rows of short runs, waiting for a masked tile

    def flush() -> None:
        for block in blocks_of(pending):
            low, high = key_start[block[0]], max(int(key_stop[row]) for row in block)
            tiles.append(Tile("masked", (block[0], block[-1] + 1), (int(low), int(high))))
        pending.clear()

    for first, last, advance_start, advance_stop in runs(key_start, key_stop):
        rows = last - first
        if rows < SHORT_RUN and len(key_start) > SHORT_RUN:
            pending.extend(range(first, last))
            continue
        tiles.extend(_run_tiles(first, rows, int(key_start[first]), int(key_stop[first]), advance_start, advance_stop))
    flush()
    return tiles


def runs(key_start: IntArray, key_stop: IntArray) -> list[tuple[int, int, int, int]]:
    """Maximal runs ``(first row, end row, advance of start, advance of stop)`` of non-empty intervals."""
    rows = len(key_start)
    live = key_stop > key_start
    step_start, step_stop = np.diff(key_start), np.diff(key_stop)
    straight = live[:-1] & live[1:] & (step_start <= 1) & (step_stop <= 1)
    slope = np.where(straight, 2 * step_start + step_stop, -1)
    changes = np.flatnonzero(np.diff(slope)) + 1
    bounds = [0, *changes.tolist(), rows - 1]
    runs: list[tuple[int, int, int, int]] = []
    taken = 0  # rows already in a run: neighbouring slopes share the row between them
    for low, high in pairwise(bounds):
        value = int(slope[low]) if low < rows - 1 else -1
        if value >= 0:
            first = max(low, taken)
            if high + 1 > first:
                runs.append((first, high + 1, value >> 1, value & 1))
                taken = high + 1
        else:
            for row in range(max(low, taken), high):
                if live[row]:
                    runs.append((row, row + 1, 0, 0))
                taken = row + 1
    if taken < rows and live[rows - 1]:
        runs.append((rows - 1, rows, 0, 0))
    return runs


def _run_tiles(row: int, rows: int, start: int, stop: int, advance_start: int, advance_stop: int) -> list[Tile]:
    """Tiles of one run; ``start`` and ``stop`` are the interval of its first query."""
    if rows == 1 or (advance_start, advance_stop) == (0, 0):
        return [Tile("full", (row, row + rows), (start, stop))]
    if (advance_start, advance_stop) == (0, 1):
        triangle = Tile("lower", (row, row + rows), (stop - 1, stop - 1 + rows))
        return [triangle, *([Tile("full", (row, row + rows), (start, stop - 1))] if stop - 1 > start else [])]
    if (advance_start, advance_stop) == (1, 0):
        triangle = Tile("upper", (row, row + rows), (start, start + rows))
        return [triangle, *([Tile("full", (row, row + rows), (start + rows, stop))] if stop > start + rows else [])]
    width = stop - start
    block = min(rows, width)
    count, rest = divmod(rows, block)
    tiles = [Tile("upper", (row, row + block), (start, start + block), count, block)]
    if width > block:
        tiles.append(Tile("full", (row, row + block), (start + block, stop), count, block))
    if block > 1:
        tiles.append(Tile("lower", (row + 1, row + block), (stop, stop + block - 1), count, block))
    if rest:
        done = count * block
        tiles.extend(_run_tiles(row + done, rest, start + done, stop + done, 1, 1))
    return tiles


def blocks_of(rows: list[int]) -> list[list[int]]:
    """Split sorted rows where they are not neighbours, and into blocks of at most ``MASKED_ROWS``."""
    blocks: list[list[int]] = []
    for row in rows:
        if blocks and row == blocks[-1][-1] + 1 and len(blocks[-1]) < MASKED_ROWS:
            blocks[-1].append(row)
        else:
            blocks.append([row])
    return blocks
