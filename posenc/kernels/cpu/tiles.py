"""Cut the region of a segment into few rectangles and triangles for torch's CPU flash operator.

Along the queries, both interval bounds move in straight runs: each stands still or advances by one
key per query. A run is a rectangle, a triangle beside a rectangle, or a band. The operator computes
whole blocks of 512 keys, so a triangle is halved again and again into squares of full blocks, all
squares of one size in one batched call; a band is cut into short blocks of queries under one small
mask, again one batched call. A causal triangle of 1024 queries, in cells of 128 queries and 128 keys::

    L
    1 L                  L  8 causal triangles, one batched call
    2 2 L                1  4 squares of 128, one batched call
    2 2 1 L              2  2 squares of 256, one batched call
    3 3 3 3 L            3  1 square of 512
    3 3 3 3 1 L
    3 3 3 3 2 2 L
    3 3 3 3 2 2 1 L

``docs/internals/plan-to-calls.md`` draws a whole plan, ``docs/internals/cpu-kernel.md`` has the measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from posenc.segment import IntArray

Kind = Literal["full", "lower", "masked"]

MASKED_ROWS = 128
"""Queries per irregular masked tile: wide enough for the kernel, small enough that the mask stays in cache."""

BAND_ROWS = 32
"""Queries per block of a band: every block computes this many keys per query in vain."""

WIDE_BAND = 2048
"""Bands at least this wide are two triangles per ``width`` queries: there, masking every pair costs more."""

LEAF = 128
"""Queries of the smallest triangles."""

SHORT_RUN = 8
"""Runs shorter than this are pooled into masked tiles."""


@dataclass(frozen=True)
class Tile:
    """A block of queries against a block of keys, repeated along the diagonal.

    Parameters
    ----------
    kind : {"full", "lower", "masked"}
        Which pairs ``(r, c)`` of the block are attended: all, ``c <= r``, or those inside the queries'
        own intervals.
    rows, keys : (int, int)
        Half-open ranges of the first block.
    count : int
        Number of blocks; block ``b`` is shifted by ``b * step`` queries and keys, intervals included.
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
        rest = [Tile("full", (row, row + rows), (start, stop - 1))] if stop - 1 > start else []
        return [*_triangle(row, stop - 1, rows, upper=False), *rest]
    if (advance_start, advance_stop) == (1, 0):
        rest = [Tile("full", (row, row + rows), (start + rows, stop))] if stop > start + rows else []
        return [*_triangle(row, start, rows, upper=True), *rest]
    width = stop - start
    if width < WIDE_BAND and width <= rows:
        return _band(row, rows, start, width)
    tiles, block = [], min(rows, width)
    for first in range(0, rows - block + 1, block):
        at, key = row + first, start + first
        tiles += _triangle(at, key, block, upper=True)
        if width > block:
            tiles.append(Tile("full", (at, at + block), (key + block, key + width)))
        tiles += _triangle(at + 1, key + width, block - 1, upper=False)
    done = rows - rows % block
    return tiles + (_run_tiles(row + done, rows - done, start + done, stop + done, 1, 1) if done < rows else [])


def _band(row: int, rows: int, start: int, width: int) -> list[Tile]:
    """``{(r, c): r <= c - start < r + width}`` for ``rows`` queries, ``r`` counted from ``row``."""
    count, rest = divmod(rows, BAND_ROWS)
    tiles = []
    if count:
        tiles.append(Tile("masked", (row, row + BAND_ROWS), (start, start + width + BAND_ROWS - 1), count, BAND_ROWS))
    if rest:
        done = count * BAND_ROWS
        tiles.append(Tile("masked", (row + done, row + rows), (start + done, start + width + rows - 1)))
    return tiles


def _triangle(row: int, key: int, size: int, *, upper: bool) -> list[Tile]:
    """``{(r, c): c <= r}`` (``c >= r`` if ``upper``), ``size`` queries from ``row`` on and keys from ``key`` on."""
    count, rest = divmod(size, LEAF)
    leaf: Kind = "masked" if upper else "lower"
    tiles = []
    if count:
        tiles.append(Tile(leaf, (row, row + LEAF), (key, key + LEAF), count, LEAF))
    if rest:
        done = count * LEAF
        tiles.append(Tile(leaf, (row + done, row + size), (key + done, key + size)))
    half = LEAF
    while half < size:
        count, rest = divmod(size, 2 * half)
        for first, blocks, length in ((0, count, half), (2 * half * count, 1, rest - half)):
            if blocks and length > 0:
                near, far = (first, first + half), (first + half, first + half + length)
                rows, keys = (near, far) if upper else (far, near)
                at_rows, at_keys = (row + rows[0], row + rows[1]), (key + keys[0], key + keys[1])
                tiles.append(Tile("full", at_rows, at_keys, blocks, 2 * half))
        half *= 2
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
