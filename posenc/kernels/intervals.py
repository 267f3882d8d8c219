"""Straight runs of key intervals: what every kernel's calls are cut from.

Along the queries of a segment, each bound of the key interval stands still or advances by one key per query, with few
exceptions. A run of queries over which both do the same is a rectangle, a triangle beside a rectangle, or a band::

    key_start stands, key_stop stands      rectangle
    key_start stands, key_stop advances    triangle with its right angle at the lower left, beside a rectangle
    key_start advances, key_stop stands    triangle with its right angle at the upper right, beside a rectangle
    both advance                           band
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from posenc.segment import IntArray

SHORT_RUN = 8
"""Runs of fewer queries are pooled into blocks, each computed under a mask: a call of its own would cost more."""

BLOCK_ROWS = 128
"""Queries of such a block at most: enough for the kernel, and few enough that the mask stays in cache."""


class Run(NamedTuple):
    """Queries ``first .. stop - 1``, and by how many keys per query their intervals start and stop later: 0 or 1."""

    first: int
    stop: int
    advance_start: int
    advance_stop: int


def runs(key_start: IntArray, key_stop: IntArray) -> list[Run]:
    """The longest straight runs of non-empty intervals.

    Parameters
    ----------
    key_start, key_stop : int64 [rows]
        Non-decreasing bounds, one interval per query; empty where ``key_start >= key_stop``.
    """
    rows = len(key_start)
    live = key_stop > key_start
    step_start, step_stop = np.diff(key_start), np.diff(key_stop)
    straight = live[:-1] & live[1:] & (step_start <= 1) & (step_stop <= 1)
    slope = np.where(straight, 2 * step_start + step_stop, -1)
    changes = np.flatnonzero(np.diff(slope)) + 1
    bounds = [0, *changes.tolist(), rows - 1]
    result: list[Run] = []
    taken = 0  # rows already in a run: neighbouring slopes share the row between them
    for low, high in pairwise(bounds):
        value = int(slope[low]) if low < rows - 1 else -1
        if value >= 0:
            first = max(low, taken)
            if high + 1 > first:
                result.append(Run(first, high + 1, value >> 1, value & 1))
                taken = high + 1
        else:
            for row in range(max(low, taken), high):
                if live[row]:
                    result.append(Run(row, row + 1, 0, 0))
                taken = row + 1
    if taken < rows and live[rows - 1]:
        result.append(Run(rows - 1, rows, 0, 0))
    return result


def blocks_of(rows: Iterable[int]) -> list[tuple[int, int]]:
    """Half-open blocks of sorted rows: split where rows are missing, and at most :data:`BLOCK_ROWS` each."""
    blocks: list[tuple[int, int]] = []
    for row in rows:
        if blocks and row == blocks[-1][1] and row - blocks[-1][0] < BLOCK_ROWS:
            blocks[-1] = blocks[-1][0], row + 1
        else:
            blocks.append((row, row + 1))
    return blocks
