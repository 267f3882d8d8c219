"""Cut a segment into windowed calls, for kernels that know a window of keys around the diagonal.

Flash attention on a GPU takes how many keys to the left and to the right of the diagonal a query sees, where the
diagonal ends in the last query's last key. One such call covers what takes three on a kernel that only knows
causal: see :mod:`posenc.kernels.cpu.tiles`. A plan of a near window ``n`` and a far segment ``g``, in cells of 128
queries and 128 keys; where both meet, a cell is cut along its diagonal::

    n
    n   n                      n  one call through a window: left=255, right=0
    g/n n   n                  g  one causal call, from query 256 on
    g   g/n n   n
    g   g   g/n n   n          The first 256 queries are n alone; the others are n and g, merged by logsumexp.

Shape letters: R queries and K keys of one call.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from posenc.kernels.cpu.tiles import SHORT_RUN, blocks_of, runs
from posenc.kernels.rotated import layout
from posenc.plan import PositionPlan
from posenc.segment import IntArray


@dataclass(frozen=True)
class Band:
    """A block of queries against a block of keys, through a window.

    Query ``r`` of the block sees key ``c`` where ``-left <= c - r - (K - R) <= right``, and at least one key.

    Parameters
    ----------
    rows, keys : (int, int)
        Half-open ranges.
    left, right : int or None
        Keys seen before and after the diagonal; None where there is no limit.
    irregular : bool
        The intervals themselves say what is seen: they follow no window.
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    left: int | None = None
    right: int | None = None
    irregular: bool = False


def bands(key_start: IntArray, key_stop: IntArray) -> list[Band]:
    """Bands that cover ``{(r, c): key_start[r] <= c < key_stop[r]}`` exactly once.

    Parameters
    ----------
    key_start, key_stop : int64 [rows]
        Non-decreasing bounds, one interval per query; empty where ``key_start >= key_stop``.
    """
    found: list[Band] = []
    short: dict[tuple[int, int], Band] = {}
    for band in _straight(key_start, key_stop):
        if band.rows[1] - band.rows[0] < SHORT_RUN and len(key_start) > SHORT_RUN:
            short[band.rows] = band
        else:
            found.append(band)
    for block in blocks_of([row for rows in short for row in range(*rows)]):
        rows, keys = (block[0], block[-1] + 1), (int(key_start[block[0]]), int(key_stop[block[-1]]))
        found.append(short.get(rows) or Band(rows, keys, irregular=True))
    return found


def _straight(key_start: IntArray, key_stop: IntArray) -> list[Band]:
    """One band per run of straight bounds; a causal run and the band that it goes on as are one where that pays.

    Flash attention takes a slower path for a window than for a causal call, and so for every query of what is joined.
    One call instead of two pays where most of its queries have a window anyway.
    """
    found: list[Band] = []
    for first, last, advance_start, advance_stop in runs(key_start, key_stop):
        start, first_stop, stop = int(key_start[first]), int(key_stop[first]), int(key_stop[last - 1])
        band = Band((first, last), (start, stop), *_window(last - first, start, first_stop, stop, advance_start))
        if found and advance_start and advance_stop and _continues(found[-1], band) and _pays(found[-1], band):
            before = found.pop()
            band = Band((before.rows[0], last), (before.keys[0], stop), left=first_stop - start - 1, right=0)
        found.append(band)
    return found


def _window(rows: int, start: int, first_stop: int, stop: int, advance_start: int) -> tuple[int | None, int | None]:
    """``left`` and ``right`` of a run of straight bounds over the keys ``start .. stop - 1``."""
    right = 0 if stop > first_stop else None
    if not advance_start or rows == 1:
        return None, right
    return (stop - start - rows if right is None else first_stop - start - 1), right


def _continues(causal: Band, band: Band) -> bool:
    """True where a band goes on as a causal block began: the window then moves off the first key."""
    return (
        (causal.left, causal.right) == (None, 0)
        and causal.rows[1] == band.rows[0]
        and causal.keys[0] <= band.keys[0] <= causal.keys[0] + 1
        and causal.keys[1] + 1 == band.keys[1] - (band.rows[1] - band.rows[0] - 1)
    )


def _pays(causal: Band, band: Band) -> bool:
    """Whether at least half of the queries of both together have a window."""
    return causal.rows[1] - causal.rows[0] <= band.rows[1] - band.rows[0]


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: a band of a segment.

    Parameters
    ----------
    work, copy : int
        Which rotated queries and keys of the plan's layout.
    band : Band
        ``rows`` counted in the segment's queries, ``keys`` in the copy's keys.
    rows, values : slice
        The same queries among all queries, and the same keys among all values.
    allowed : bool [R, K] or None
        What an irregular band sees.
    """

    work: int
    copy: int
    band: Band
    rows: slice
    values: slice
    allowed: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class Schedule:
    """All calls of a plan and, per range of queries, which of them its output is merged from."""

    calls: tuple[Call, ...]
    merges: tuple[tuple[slice, tuple[int, ...]], ...]


def schedule(plan: PositionPlan, q_len: int) -> Schedule:
    """The calls for the last ``q_len`` queries, worked out once per plan and shared by every layer."""
    return plan.derived(_schedule, q_len)


def _schedule(plan: PositionPlan, q_len: int) -> Schedule:
    calls = _calls(plan, q_len)
    return Schedule(calls, _merges(calls))


def _calls(plan: PositionPlan, q_len: int) -> tuple[Call, ...]:
    arranged = layout(plan, q_len)
    found = []
    for index, work in enumerate(arranged.work):
        offset = arranged.copies[work.copy].keys.start
        for band in bands(work.key_start, work.key_stop):
            rows = slice(work.rows.start + band.rows[0], work.rows.start + band.rows[1])
            values = slice(offset + band.keys[0], offset + band.keys[1])
            allowed = None
            if band.irregular:
                keys, own = np.arange(*band.keys), slice(*band.rows)
                allowed = (keys >= work.key_start[own, None]) & (keys < work.key_stop[own, None])
            found.append(Call(index, work.copy, band, rows, values, allowed))
    return tuple(found)


def _merges(calls: tuple[Call, ...]) -> tuple[tuple[slice, tuple[int, ...]], ...]:
    """Ranges of queries between which the set of calls changes; queries that attend nothing are in none."""
    edges = sorted({edge for call in calls for edge in (call.rows.start, call.rows.stop)})
    found = []
    for low, high in pairwise(edges):
        inside = tuple(n for n, call in enumerate(calls) if call.rows.start <= low and high <= call.rows.stop)
        if inside:
            found.append((slice(low, high), inside))
    return tuple(found)
