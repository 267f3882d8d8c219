"""What the Triton kernels read of plans: intervals, rows of tables, requests, on the device.

Worked out once per plan and shared by every layer. For decoding it costs the host a few hundred numbers per token and
one copy to the device, whatever the length: what belongs to the keys hangs on the longer plan that this one is a prefix
of.

Shape letters: L the last queries of a plan, F rotary frequencies, S segments, N requests, R rows of a query table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posenc.kernels.rotated import KeyCopy, layout
from posenc.kernels.triton.angles import Angles, angles, key_angles
from posenc.plan import PositionPlan
from posenc.rope import Rotary
from posenc.segment import Positions

REQUEST = 8
"""Numbers of a request in the decode kernel's table, and of a segment."""

ALIGNED = 16
"""Bytes to whose multiples arrays are moved."""


@dataclass(frozen=True)
class Scales:
    """Factor on the logits before, and on their hyperbolic tangent, both for softmax in base 2."""

    factor: float
    cap: float | None

    @classmethod
    def of(cls, scale: float, softcap: float | None) -> Scales:
        """With a softcap, ``tanh(x) = 1 - 2 / (1 + 2 ** (2 log2(e) x))``."""
        log2e = math.log2(math.e)
        if softcap is None:
            return cls(scale * log2e, None)
        return cls(scale / softcap * 2 * log2e, softcap * log2e)


@dataclass(frozen=True, eq=False)
class Copied:
    """A run of rows of a buffer: which queries or keys they are, and their angles."""

    rows: slice
    angles: Angles

    @property
    def count(self) -> int:
        """How many rows."""
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True, eq=False)
class PrefillTables:
    """One plan's last queries for the prefill kernel.

    Parameters
    ----------
    intervals_S2L : int32
        Every segment's key_start and key_stop, counted in its copy of the keys.
    segments_S3 : int64
        Where its copy lies in the buffer of rotated keys and among the values, and how far the row of a query
        in the buffer of rotated queries is from the query's own number.
    factors_L : float32 or None
        The plan's ``query_scale``.
    queries, keys : tuple of Copied
        What the two buffers hold, one after the other.
    """

    intervals_S2L: Tensor
    segments_S3: Tensor
    factors_L: Tensor | None
    queries: tuple[Copied, ...]
    keys: tuple[Copied, ...]


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
        table row of key 0.
    requests_N8 : int64
        Its first segment and how many there are; its first query and how many there are; its first row in the query
        tables; its first factor; how many keys its segments have; and a 0.
    cos_RF, sin_RF : float32
        Query tables, ``L`` rows per segment.
    factors : float32 or None
        The plans' ``query_scale``.
    counts, keys : tuple of int
        Queries and keys of every request: keys of all segments together.
    copies : tuple of KeyCopy
        The rotated copies of the keys that a single request's segments read.
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
    copies: tuple[KeyCopy, ...]
    alive: tuple[Tensor, ...]


def prefill_tables(plan: PositionPlan, q_len: int, rotary: Rotary, device: torch.device) -> PrefillTables | None:
    """Tables for the prefill kernel, worked out once; None where the queries attend nothing."""
    return plan.derived(_prefill_tables, q_len, rotary, device)


def decode_tables(
    plans: Sequence[PositionPlan],
    counts: Sequence[int],
    rotary: Rotary,
    device: torch.device,
    *,
    ragged: bool = False,
) -> DecodeTables:
    """Tables for the decode kernel, as :func:`request_tables` makes them, worked out once for all layers."""
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
    return request_tables((first, *others), counts, rotary, device, ragged=ragged)


def _prefill_tables(plan: PositionPlan, q_len: int, rotary: Rotary, device: torch.device) -> PrefillTables | None:
    arranged = layout(plan, q_len)
    if not arranged.work:
        return None
    places = np.cumsum([0, *(copy.keys.stop - copy.keys.start for copy in arranged.copies)])
    intervals_S2L = np.zeros((len(arranged.work), 2, q_len), dtype=np.int32)
    segments_S3 = np.empty((len(arranged.work), 3), dtype=np.int64)
    done, queries = 0, []
    for number, work in enumerate(arranged.work):
        intervals_S2L[number, 0, work.rows] = work.key_start
        intervals_S2L[number, 1, work.rows] = work.key_stop
        segments_S3[number] = places[work.copy], arranged.copies[work.copy].keys.start, done - work.rows.start
        own = angles(work.query_positions, rotary, device, interpolation=work.segment.interpolation)
        queries.append(Copied(work.rows, own))
        done += len(work.query_positions)
    keys = []
    for copy in arranged.copies:
        whole, offset = key_angles(copy.segment, rotary, device)
        keys.append(Copied(copy.keys, whole.of(slice(offset + copy.keys.start, offset + copy.keys.stop))))
    upload = _Upload()
    upload.add(intervals_S2L)
    upload.add(segments_S3)
    if plan.query_scale is not None:
        upload.add(_factors(plan, q_len))
    moved = upload.to(device)
    factors_L = None if plan.query_scale is None else moved[2]
    return PrefillTables(moved[0], moved[1], factors_L, tuple(queries), tuple(keys))


def request_tables(
    plans: Sequence[PositionPlan],
    counts: Sequence[int],
    rotary: Rotary,
    device: torch.device,
    *,
    ragged: bool = False,
) -> DecodeTables:
    """Tables for the last queries of several plans, each a request of its own.

    Parameters
    ----------
    counts : sequence of int
        Queries of every request.
    ragged : bool
        The queries of all requests follow each other in one row; else every request is a batch row.
    """
    segments: list[tuple[int, ...]] = []
    requests: list[tuple[int, ...]] = []
    intervals: list[NDArray[np.int32]] = []
    positions: list[Positions] = []
    alive: list[Tensor] = []
    query = row = 0
    copies: tuple[KeyCopy, ...] = ()
    for plan, count in zip(plans, counts, strict=True):
        arranged = layout(plan, count)
        copies, first, keys = arranged.copies, len(segments), 0
        for work in arranged.work:
            copy = copies[work.copy]
            bounds_2L = np.zeros((2, count), dtype=np.int32)
            bounds_2L[0, work.rows], bounds_2L[1, work.rows] = work.key_start, work.key_stop
            bounds_2L[:, work.rows] += copy.keys.start
            used = bounds_2L[1] > bounds_2L[0]
            low, high = int(bounds_2L[0, used].min()), int(bounds_2L[1, used].max())
            table, offset = key_angles(copy.segment, rotary, device)
            addresses = (x.data_ptr() for x in (table.cos_RF, table.sin_RF, table.rows_L[offset:]))
            segments.append((low, high, keys, work.copy, copy.keys.start, *addresses))
            intervals.append(bounds_2L.reshape(-1))
            positions.append(_spread(work.query_positions, work.rows, count))
            alive += [table.cos_RF, table.sin_RF, table.rows_L]
            keys += high - low
        requests.append((first, len(segments) - first, query if ragged else 0, count, row, query, keys, 0))
        query += count
        row += count * (len(segments) - first)
    scaled = any(plan.query_scale is not None for plan in plans)
    upload = _Upload()
    upload.add(np.concatenate([np.zeros(0, dtype=np.int32), *intervals]))
    upload.add(np.array(segments, dtype=np.int64).reshape(-1, REQUEST))
    upload.add(np.array(requests, dtype=np.int64))
    for table_RF in _query_tables(positions, rotary):
        upload.add(table_RF)
    if scaled:
        upload.add(np.concatenate([_factors(plan, count) for plan, count in zip(plans, counts, strict=True)]))
    moved = upload.to(device)
    bounds, segments_S8, requests_N8, cos_RF, sin_RF = moved[:5]
    return DecodeTables(
        bounds,
        segments_S8,
        requests_N8,
        cos_RF,
        sin_RF,
        factors=moved[5] if scaled else None,
        counts=tuple(counts),
        keys=tuple(request[6] for request in requests),
        copies=copies if len(plans) == 1 else (),
        alive=tuple(alive),
    )


def _spread(positions: Positions, rows: slice, count: int) -> Positions:
    """Positions of some of the queries, among those of all: zero elsewhere."""
    if len(positions) == count:
        return positions
    spread = np.zeros((count, *positions.shape[1:]), dtype=positions.dtype)
    spread[rows] = positions
    return spread


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


def _factors(plan: PositionPlan, q_len: int) -> NDArray[np.float32]:
    """The plan's factors of the logits of its last queries."""
    if plan.query_scale is None:
        return np.ones(q_len, dtype=np.float32)
    return plan.query_scale[plan.total - q_len :].astype(np.float32)


class _Upload:
    """Several arrays in one copy to the device."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[Any]] = []

    def add(self, array: NDArray[Any]) -> None:
        """Put an array behind the others."""
        self._arrays.append(np.ascontiguousarray(array))

    def to(self, device: torch.device) -> list[Tensor]:
        """The arrays on the device, in order; it does not wait for what runs there."""
        starts = np.cumsum([0, *(-x.nbytes // ALIGNED * -ALIGNED for x in self._arrays)])
        packed = np.zeros(max(ALIGNED, int(starts[-1])), dtype=np.uint8)
        for start, array in zip(starts, self._arrays, strict=False):
            packed[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        tensor = torch.from_numpy(packed)
        moved = tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
        return [
            moved[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
            for start, array in zip(starts.tolist(), self._arrays, strict=False)
        ]
