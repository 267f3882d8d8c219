"""What the decode kernel reads of plans, on the device: a table of requests, their segments and intervals.

Worked out once per plan and shared by all layers. It costs the host a few hundred numbers per token and one copy to the
device, whatever the length: what belongs to the keys is kept on the longer plan that this one is a prefix of.

Shape letters: L the last queries of a plan, S segments, N requests, F rotary frequencies, R rows of a query table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posenc.kernels.rotated import KeyCopy, QueryCopy, RotationLayout, rotation_layout
from posenc.kernels.triton.angles import key_angles, turns, whole_key_positions
from posenc.kernels.triton.tables import query_factors
from posenc.kernels.triton.upload import uploaded_together
from posenc.plan import PositionPlan
from posenc.rope import Rotary
from posenc.segment import Positions, Segment

REQUEST = 8
"""Numbers of a request in the decode kernel's table, and of a segment."""


@dataclass(frozen=True, eq=False)
class DecodeTables:
    """The last queries of one plan or of several, the requests, for the decode kernel.

    Parameters
    ----------
    intervals : int32
        Every segment's key_start and key_stop, ``[S, 2, L]`` per request, one after the other.
    segments_S8 : int64
        Its first key and the end of its keys; how many keys the request's segments before it have; the copy of rotated
        keys it reads and the first key of that copy; the addresses of cos and sin of its map, and the address of the
        table row of key 0. If there are ``turns``, two zeros and the address of the position of key 0.
    requests_N8 : int64
        Its first segment and how many there are; its first query and how many there are; its first row in the query
        tables; its first factor; how many keys its segments have; and a 0.
    cos_RF, sin_RF : float32
        Query tables, ``L`` rows per segment.
    factors : float32 or None
        The plans' ``query_scale``.
    counts, keys : tuple of int
        Queries and keys of every request: keys of all segments together.
    turns : (Tensor, Tensor) or (None, None)
        To compute the angles of keys with (:func:`~posenc.kernels.triton.angles.turns`), if all their positions are
        whole numbers.
    copies : tuple of KeyCopy
        The rotated copies of the keys that a single request's segments read; none for several requests.
    alive : tuple of Tensor
        Keeps what the addresses point at alive.
    """

    intervals: Tensor
    segments_S8: Tensor
    requests_N8: Tensor
    cos_RF: Tensor
    sin_RF: Tensor
    factors: Tensor | None
    counts: tuple[int, ...]
    keys: tuple[int, ...]
    turns: tuple[Tensor, Tensor] | tuple[None, None]
    copies: tuple[KeyCopy, ...]
    alive: tuple[Tensor, ...]


def decode_tables(
    plans: Sequence[PositionPlan],
    counts: Sequence[int],
    rotary: Rotary,
    device: torch.device,
    *,
    ragged: bool = False,
) -> DecodeTables:
    """Tables for the last queries of several plans, each a request of its own; worked out once for all layers.

    Parameters
    ----------
    counts : sequence of int
        Queries of every request.
    ragged : bool
        The queries of all requests follow each other in one row; else every request is a batch row.
    """
    first, *others = plans
    return first.derived(_decode_tables, tuple(others), tuple(counts), rotary, device, ragged)


def _decode_tables(
    first: PositionPlan,
    others: tuple[PositionPlan, ...],
    counts: tuple[int, ...],
    rotary: Rotary,
    device: torch.device,
    ragged: bool,
) -> DecodeTables:
    plans = (first, *others)
    layouts = [rotation_layout(plan, count) for plan, count in zip(plans, counts, strict=True)]
    whole = all(whole_key_positions(copy.segment, device) is not None for layout in layouts for copy in layout.keys)
    rows = _Rows(rotary, device, ragged, whole)
    for layout, count in zip(layouts, counts, strict=True):
        rows.add_request(layout, count)
    arrays = [
        np.concatenate([np.zeros(0, dtype=np.int32), *rows.intervals]),
        np.array(rows.segments, dtype=np.int64).reshape(-1, REQUEST),
        np.array(rows.requests, dtype=np.int64),
        *_query_tables(rows.positions, rotary),
    ]
    scaled = any(plan.query_scale is not None for plan in plans)
    if scaled:
        arrays.append(np.concatenate([query_factors(plan, count) for plan, count in zip(plans, counts, strict=True)]))
    intervals, segments_S8, requests_N8, cos_RF, sin_RF, *factors = uploaded_together(arrays, device)
    return DecodeTables(
        intervals,
        segments_S8,
        requests_N8,
        cos_RF,
        sin_RF,
        factors=factors[0] if scaled else None,
        counts=counts,
        keys=tuple(request[6] for request in rows.requests),
        turns=turns(rotary, device) if whole else (None, None),
        copies=() if others else layouts[0].keys,
        alive=tuple(rows.alive),
    )


class _Rows:
    """The rows of the tables, request by request."""

    def __init__(self, rotary: Rotary, device: torch.device, ragged: bool, whole: bool) -> None:
        self._rotary, self._device, self._ragged, self._whole = rotary, device, ragged, whole
        self._queries = self._table_rows = 0
        self.segments: list[tuple[int, ...]] = []
        self.requests: list[tuple[int, ...]] = []
        self.intervals: list[NDArray[np.int32]] = []
        self.positions: list[Positions] = []
        self.alive: list[Tensor] = []

    def add_request(self, layout: RotationLayout, count: int) -> None:
        """Add the last ``count`` queries of a plan."""
        first_segment, keys = len(self.segments), 0
        for copy in layout.queries:
            keys += self._add_segment(copy, layout.keys[copy.key_copy], count, keys)
        segments, first_query = len(layout.queries), self._queries if self._ragged else 0
        self.requests.append((first_segment, segments, first_query, count, self._table_rows, self._queries, keys, 0))
        self._queries += count
        self._table_rows += count * segments

    def _add_segment(self, copy: QueryCopy, key_copy: KeyCopy, count: int, keys_before: int) -> int:
        """Add a segment's queries among ``count``; returns how many keys they attend together."""
        bounds_2L = np.zeros((2, count), dtype=np.int32)
        bounds_2L[0, copy.rows], bounds_2L[1, copy.rows] = copy.key_start, copy.key_stop
        bounds_2L[:, copy.rows] += key_copy.keys.start
        used = bounds_2L[1] > bounds_2L[0]
        low, high = int(bounds_2L[0, used].min()), int(bounds_2L[1, used].max())
        addresses = self._addresses(key_copy.segment)
        self.segments.append((low, high, keys_before, copy.key_copy, key_copy.keys.start, *addresses))
        self.intervals.append(bounds_2L.reshape(-1))
        self.positions.append(_among_all(copy.positions, copy.rows, count))
        return high - low

    def _addresses(self, segment: Segment) -> tuple[int, int, int]:
        if self._whole:
            positions_L = whole_key_positions(segment, self._device)
            assert positions_L is not None
            self.alive.append(positions_L)
            return 0, 0, positions_L.data_ptr()
        table, offset = key_angles(segment, self._rotary, self._device)
        self.alive += [table.cos_RF, table.sin_RF, table.rows_L]
        return table.cos_RF.data_ptr(), table.sin_RF.data_ptr(), table.rows_L[offset:].data_ptr()


def _among_all(positions: Positions, rows: slice, count: int) -> Positions:
    """Positions of some of ``count`` queries, among those of all: zero elsewhere."""
    if len(positions) == count:
        return positions
    padded = np.zeros((count, *positions.shape[1:]), dtype=positions.dtype)
    padded[rows] = positions
    return padded


def _query_tables(positions: list[Positions], rotary: Rotary) -> tuple[NDArray[Any], NDArray[Any]]:
    """cos and sin of the positions of several segments one after the other; per frequency where one segment's are."""
    count = len(rotary.inv_freq)
    if not positions:
        return np.zeros((1, count), dtype=np.float32), np.zeros((1, count), dtype=np.float32)
    if any(x.ndim > 1 for x in positions):
        for x in positions:
            rotary.check_positions(x.shape)
        positions = [np.broadcast_to(x if x.ndim > 1 else x[:, None], (len(x), count)) for x in positions]
    cos_RF, sin_RF = rotary.derived(_on_host).tables(np.concatenate(positions))
    return cos_RF.numpy(), sin_RF.numpy()


def _on_host(rotary: Rotary) -> Rotary:
    """The rotary with its frequencies on the host: asking the device for them would wait for it."""
    return replace(rotary, inv_freq=rotary.inv_freq.cpu())
