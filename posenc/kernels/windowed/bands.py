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

from posenc.kernels.intervals import SHORT_RUN, Run, blocks_of, runs
from posenc.kernels.rotated import QueryCopy, rotation_layout
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

    @property
    def count(self) -> int:
        """How many queries."""
        return self.rows[1] - self.rows[0]


@dataclass(frozen=True, eq=False)
class BandCall:
    """One kernel call: a band of a segment.

    Parameters
    ----------
    query_copy, key_copy : int
        The rotated queries and keys that it reads, by their numbers in the layout.
    band : Band
        ``rows`` counted in the segment's queries, ``keys`` in the copy's keys.
    rows, values : slice
        The same queries among all queries, and the same keys among all values.
    allowed : bool [R, K] or None
        The pairs that an irregular band attends.
    """

    query_copy: int
    key_copy: int
    band: Band
    rows: slice
    values: slice
    allowed: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class BandSchedule:
    """All calls of a plan, and how their results are merged.

    Parameters
    ----------
    calls : tuple of BandCall
        They attend every pair of the plan once.
    merges : tuple of (slice, tuple of int)
        Ranges of queries, each with the numbers of the calls that its output is merged from.
    """

    calls: tuple[BandCall, ...]
    merges: tuple[tuple[slice, tuple[int, ...]], ...]


def band_schedule(plan: PositionPlan, q_len: int) -> BandSchedule:
    """The calls for the last ``q_len`` queries, worked out once per plan and shared by all layers."""
    return plan.derived(_band_schedule, q_len)


def _band_schedule(plan: PositionPlan, q_len: int) -> BandSchedule:
    layout = rotation_layout(plan, q_len)
    calls = []
    for number, copy in enumerate(layout.queries):
        offset = layout.keys[copy.key_copy].keys.start
        for band in bands(copy.key_start, copy.key_stop):
            rows = slice(copy.rows.start + band.rows[0], copy.rows.start + band.rows[1])
            values = slice(offset + band.keys[0], offset + band.keys[1])
            allowed = _interval_mask(copy, band) if band.irregular else None
            calls.append(BandCall(number, copy.key_copy, band, rows, values, allowed))
    return BandSchedule(tuple(calls), _merges(calls))


def _interval_mask(copy: QueryCopy, band: Band) -> NDArray[np.bool_]:
    """Pairs of a band that lie inside the intervals, bool [R, K]."""
    rows, keys = slice(*band.rows), np.arange(*band.keys)
    inside: NDArray[np.bool_] = (keys >= copy.key_start[rows, None]) & (keys < copy.key_stop[rows, None])
    return inside


def _merges(calls: list[BandCall]) -> tuple[tuple[slice, tuple[int, ...]], ...]:
    """Ranges of queries between which the set of calls changes; queries that attend nothing are in none."""
    edges = sorted({edge for call in calls for edge in (call.rows.start, call.rows.stop)})
    merges = []
    for low, high in pairwise(edges):
        inside = tuple(n for n, call in enumerate(calls) if call.rows.start <= low and high <= call.rows.stop)
        if inside:
            merges.append((slice(low, high), inside))
    return tuple(merges)


def bands(key_start: IntArray, key_stop: IntArray) -> list[Band]:
    """Bands that cover ``{(r, c): key_start[r] <= c < key_stop[r]}`` exactly once.

    Parameters
    ----------
    key_start, key_stop : int64 [rows]
        Non-decreasing bounds, one interval per query; empty where ``key_start >= key_stop``.
    """
    result: list[Band] = []
    short: dict[tuple[int, int], Band] = {}
    for band in _straight_bands(key_start, key_stop):
        if band.count < SHORT_RUN and len(key_start) > SHORT_RUN:
            short[band.rows] = band
        else:
            result.append(band)
    for rows in blocks_of(row for band_rows in short for row in range(*band_rows)):
        keys = int(key_start[rows[0]]), int(key_stop[rows[1] - 1])
        result.append(short.get(rows) or Band(rows, keys, irregular=True))
    return result


def _straight_bands(key_start: IntArray, key_stop: IntArray) -> list[Band]:
    """One band per straight run; a causal run and the band that continues it are one where that pays.

    Flash attention takes a slower path for a window than for a causal call, and so for every query of what is joined.
    One call instead of two pays where at least half of its queries have a window anyway.
    """
    result: list[Band] = []
    for run in runs(key_start, key_stop):
        start, first_stop, stop = int(key_start[run.first]), int(key_stop[run.first]), int(key_stop[run.stop - 1])
        band = Band((run.first, run.stop), (start, stop), *_window(run, start, first_stop, stop))
        if result and run.advance_start and run.advance_stop and _joins(result[-1], band):
            before = result.pop()
            band = Band((before.rows[0], run.stop), (before.keys[0], stop), left=first_stop - start - 1, right=0)
        result.append(band)
    return result


def _window(run: Run, start: int, first_stop: int, stop: int) -> tuple[int | None, int | None]:
    """``left`` and ``right`` of a run over the keys ``start .. stop - 1``; its first query stops at ``first_stop``."""
    rows, right = run.stop - run.first, 0 if stop > first_stop else None
    if not run.advance_start or rows == 1:
        return None, right
    return (stop - start - rows if right is None else first_stop - start - 1), right


def _joins(causal: Band, band: Band) -> bool:
    """Whether a band continues a causal block, as its window moves off the first key, and has as many queries."""
    return (
        (causal.left, causal.right) == (None, 0)
        and causal.rows[1] == band.rows[0]
        and causal.keys[0] <= band.keys[0] <= causal.keys[0] + 1
        and causal.keys[1] + 1 == band.keys[1] - (band.count - 1)
        and causal.count <= band.count
    )
