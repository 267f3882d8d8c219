"""What the Triton kernels read of a plan: intervals, offsets and cos/sin tables on the device.

Worked out once per plan and shared by every layer. For decoding it costs the host a few hundred numbers per token,
whatever the length: the tables of the keys belong to the longer plan that this one is a prefix of.

Shape letters: L the last queries of a plan, F rotary frequencies, S segments, R rows of a query table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posenc.kernels.memo import remembered
from posenc.kernels.rotated import layout
from posenc.plan import PositionPlan, Positions, Segment
from posenc.rope import Rotary


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
class PrefillTables:
    """One plan's last queries for the prefill kernel.

    Parameters
    ----------
    intervals_S2L : int32
        Every segment's key_start and key_stop, counted in its copy of the keys.
    segments_S3 : int64
        Where its copy lies in the buffer of rotated keys and among the values, and how far the row of a query
        in the query tables is from the query's own number.
    cos_RF, sin_RF : float32
        Query tables, one segment behind the other.
    factors_L : float32 or None
        The plan's ``query_scale``.
    copies : tuple of (slice, Tensor, Tensor)
        Keys of every copy and their cos and sin.
    """

    intervals_S2L: Tensor
    segments_S3: Tensor
    cos_RF: Tensor
    sin_RF: Tensor
    factors_L: Tensor | None
    copies: tuple[tuple[slice, Tensor, Tensor], ...]

    @property
    def copied(self) -> int:
        """Rows of the buffer of rotated keys."""
        return sum(keys.stop - keys.start for keys, _, _ in self.copies)


@dataclass(frozen=True, eq=False)
class DecodeTables:
    """One plan's last queries for the decode kernel.

    Parameters
    ----------
    intervals_S2L : int32
        Every segment's key_start and key_stop.
    segments_S6 : int64
        Its first key and the end of its keys, how many keys the segments before it have, the addresses of the cos
        and the sin of its map, and their row for key 0.
    cos_RF, sin_RF : float32
        Query tables, ``L`` rows per segment.
    factors_L : float32 or None
        The plan's ``query_scale``.
    keys : int
        Keys of all segments together.
    maps : tuple of Tensor
        Keeps what the addresses point at alive.
    """

    intervals_S2L: Tensor
    segments_S6: Tensor
    cos_RF: Tensor
    sin_RF: Tensor
    factors_L: Tensor | None
    keys: int
    maps: tuple[Tensor, ...]


def prefill_tables(plan: PositionPlan, q_len: int, rotary: Rotary, device: torch.device) -> PrefillTables | None:
    """Tables for the prefill kernel, worked out once; None where the queries attend nothing."""
    key = ("triton prefill", q_len, rotary, str(device))
    return remembered(plan.memo, key, lambda: _prefill_tables(plan, q_len, rotary, device))


def decode_tables(plan: PositionPlan, q_len: int, rotary: Rotary, device: torch.device) -> DecodeTables | None:
    """Tables for the decode kernel, worked out once; None where the queries attend nothing."""
    key = ("triton decode", q_len, rotary, str(device))
    return remembered(plan.memo, key, lambda: _decode_tables(plan, q_len, rotary, device))


def _prefill_tables(plan: PositionPlan, q_len: int, rotary: Rotary, device: torch.device) -> PrefillTables | None:
    arranged = layout(plan, q_len)
    if not arranged.work:
        return None
    counts = [copy.keys.stop - copy.keys.start for copy in arranged.copies]
    places = np.cumsum([0, *counts])
    intervals_S2L = np.zeros((len(arranged.work), 2, q_len), dtype=np.int32)
    segments_S3 = np.empty((len(arranged.work), 3), dtype=np.int64)
    done = 0
    for number, work in enumerate(arranged.work):
        intervals_S2L[number, 0, work.rows] = work.key_start
        intervals_S2L[number, 1, work.rows] = work.key_stop
        segments_S3[number] = places[work.copy], arranged.copies[work.copy].keys.start, done - work.rows.start
        done += len(work.query_positions)
    positions = _stacked([work.query_positions for work in arranged.work], rotary)
    copies = []
    for copy in arranged.copies:
        cos_LF, sin_LF, offset = key_tables(copy.segment, rotary, device)
        rows = slice(offset + copy.keys.start, offset + copy.keys.stop)
        copies.append((copy.keys, cos_LF[rows], sin_LF[rows]))
    return PrefillTables(
        _upload(intervals_S2L, device),
        _upload(segments_S3, device),
        *rotary.tables(positions, device=device),
        _factors(plan, q_len, device),
        tuple(copies),
    )


def _decode_tables(plan: PositionPlan, q_len: int, rotary: Rotary, device: torch.device) -> DecodeTables | None:
    first = plan.total - q_len
    live = [s for s in plan.segments if bool((s.key_stop[first:] > s.key_start[first:]).any())]
    if not live:
        return None
    intervals_S2L = np.empty((len(live), 2, q_len), dtype=np.int32)
    segments_S6 = np.empty((len(live), 6), dtype=np.int64)
    keys, maps = 0, []
    for number, segment in enumerate(live):
        start, stop = segment.key_start[first:], segment.key_stop[first:]
        used = stop > start
        low, high = int(start[used].min()), int(stop[used].max())
        cos_LF, sin_LF, offset = key_tables(segment, rotary, device)
        intervals_S2L[number] = start, stop
        segments_S6[number] = low, high, keys, cos_LF.data_ptr(), sin_LF.data_ptr(), offset
        keys += high - low
        maps += [cos_LF, sin_LF]
    positions = _stacked([s.query_positions[first:] for s in live], rotary)
    cos_RF, sin_RF = _on_host(rotary, plan).tables(positions)
    return DecodeTables(
        _upload(intervals_S2L, device),
        _upload(segments_S6, device),
        _upload(cos_RF.numpy(), device),
        _upload(sin_RF.numpy(), device),
        _factors(plan, q_len, device),
        keys,
        tuple(maps),
    )


def key_tables(segment: Segment, rotary: Rotary, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """cos and sin of the key positions of the segment that this one is a slice of, and where the slice starts."""
    root, offset = segment.origin or (segment, 0)
    key = ("triton keys", rotary, str(device))
    cos_LF, sin_LF = remembered(root.memo, key, lambda: rotary.tables(root.key_positions, device=device))
    return cos_LF, sin_LF, offset


def _on_host(rotary: Rotary, plan: PositionPlan) -> Rotary:
    """The rotary with its frequencies on the host: asking the device for them would wait for it."""
    root, _ = plan.segments[0].origin or (plan.segments[0], 0)
    key = ("host", rotary)
    return remembered(root.memo, key, lambda: replace(rotary, inv_freq=rotary.inv_freq.cpu()))


def _stacked(positions: list[Positions], rotary: Rotary) -> Positions:
    """Positions of several segments one behind the other; per frequency where one segment's are."""
    if any(x.ndim > 1 for x in positions):
        count = len(rotary.inv_freq)
        for x in positions:
            rotary.check_positions(x.shape)
        positions = [np.broadcast_to(x if x.ndim > 1 else x[:, None], (len(x), count)) for x in positions]
    return np.concatenate(positions)


def _factors(plan: PositionPlan, q_len: int, device: torch.device) -> Tensor | None:
    if plan.query_scale is None:
        return None
    return _upload(plan.query_scale[plan.total - q_len :].astype(np.float32), device)


def _upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """To the device, without waiting for what runs there."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
