"""Cut the region of a segment into few rectangles and triangles for torch's CPU flash operator.

The operator computes whole blocks of 512 keys. So a triangle is halved again and again into squares of full blocks, and
all squares of one size are one batched call. A band is cut into short blocks of queries under one small mask, which is
again one batched call. A causal triangle of 1024 queries, in cells of 128 queries and 128 keys::

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
from typing import Literal

from posenc.kernels.intervals import SHORT_RUN, Run, blocks_of, runs
from posenc.segment import IntArray

Kind = Literal["full", "lower", "masked"]

BAND_ROWS = 32
"""Queries per block of a band: every query of a block computes this many keys in vain."""

WIDE_BAND = 2048
"""Bands at least this wide are two triangles per ``width`` queries: there, masking every pair costs more."""

LEAF = 128
"""Queries of the smallest triangles."""


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


def tiles_of(key_start: IntArray, key_stop: IntArray) -> list[Tile]:
    """Tiles that cover ``{(r, c): key_start[r] <= c < key_stop[r]}`` exactly once.

    Parameters
    ----------
    key_start, key_stop : int64 [rows]
        Non-decreasing bounds, one interval per query; empty where ``key_start >= key_stop``.
    """
    tiles: list[Tile] = []
    pooled: list[int] = []
    for run in runs(key_start, key_stop):
        if run.stop - run.first < SHORT_RUN and len(key_start) > SHORT_RUN:
            pooled.extend(range(run.first, run.stop))
        else:
            tiles.extend(_run_tiles(run, int(key_start[run.first]), int(key_stop[run.first])))
    for first, stop in blocks_of(pooled):
        tiles.append(Tile("masked", (first, stop), (int(key_start[first]), int(key_stop[stop - 1]))))
    return tiles


def _run_tiles(run: Run, start: int, stop: int) -> list[Tile]:
    """Tiles of one run; ``start`` and ``stop`` are the interval of its first query."""
    row, rows = run.first, run.stop - run.first
    if rows == 1 or (run.advance_start, run.advance_stop) == (0, 0):
        return [Tile("full", (row, row + rows), (start, stop))]
    if (run.advance_start, run.advance_stop) == (0, 1):
        rest = [Tile("full", (row, row + rows), (start, stop - 1))] if stop - 1 > start else []
        return [*_triangle(row, stop - 1, rows, upper=False), *rest]
    if (run.advance_start, run.advance_stop) == (1, 0):
        rest = [Tile("full", (row, row + rows), (start + rows, stop))] if stop > start + rows else []
        return [*_triangle(row, start, rows, upper=True), *rest]
    return _band(row, rows, start, stop - start)


def _band(row: int, rows: int, start: int, width: int) -> list[Tile]:
    """``{(r, c): r <= c - start < r + width}`` for ``rows`` queries, ``r`` counted from ``row``."""
    if rows == 1:
        return [Tile("full", (row, row + 1), (start, start + width))]
    if width < WIDE_BAND and width <= rows:
        return _masked_band(row, rows, start, width)
    tiles, block = [], min(rows, width)
    for first in range(0, rows - block + 1, block):
        at, key = row + first, start + first
        tiles += _triangle(at, key, block, upper=True)
        if width > block:
            tiles.append(Tile("full", (at, at + block), (key + block, key + width)))
        tiles += _triangle(at + 1, key + width, block - 1, upper=False)
    done = rows - rows % block
    return tiles + (_band(row + done, rows - done, start + done, width) if done < rows else [])


def _masked_band(row: int, rows: int, start: int, width: int) -> list[Tile]:
    """The same as blocks of :data:`BAND_ROWS` queries, each against all keys that one of them attends."""
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
