"""The calls of torch's CPU flash operator for a single query: which segments share one, and in how many splits.

An operation that torch distributes over threads takes longer to start than a short segment takes to compute. So at
every step the keys of short segments, the neighbours, are rotated into the frame of a long one, the primary. Its query
then serves both, and one call attends them together. All that does not depend on a layer's tensors is worked out once
per plan and kept there. The segments of a plan, in the order of their keys::

    keys      |    tail    |           middle            |    head    |
    role        neighbour             primary              neighbour
    rotated     every step    when new, then kept          every step
    read      [          split 0          |          split 1          ]    merged by logsumexp

Shape letters: B batch, H heads, C calls, R query heads of a key/value head, P splits of a call, L tokens, D head_dim,
F rotary frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from posenc.derived import Derivable
from posenc.kernels.rotated import (
    KeyCopy,
    QueryCopy,
    RotationLayout,
    checked,
    compute_dtype,
    key_tables,
    query_tables,
    rotation_layout,
)
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.plan import PositionPlan
from posenc.rope import Rotary
from posenc.segment import Positions

GRAIN = 2**15
"""Elements from which torch shares an operation out to threads."""

LEAST_KEYS = 1024
"""Keys worth a thread of their own."""


@dataclass(frozen=True, eq=False)
class Frame(Derivable):
    """The keys of a primary's map and, at their ends, those of its neighbours, rotated into the same frame.

    Parameters
    ----------
    copy : KeyCopy
        Keys of one map, which can be kept from step to step.
    before, after : Positions
        Positions of the neighbours' keys before and after it, which hold for one query.
    rotary : Rotary
        Rotates all of them.
    """

    copy: KeyCopy
    before: Positions
    after: Positions
    rotary: Rotary

    @cached_property
    def span(self) -> slice:
        """All keys it holds."""
        keys = self.copy.keys
        return slice(keys.start - len(self.before), keys.stop + len(self.after))

    def rotated(self, k_BHLD: Tensor, kept: RotatedKeyCache | None) -> Tensor:
        """The keys of its span, rotated, [B, H, L, D]."""
        span, copy, rotary = self.span, self.copy, self.rotary
        if copy.is_raw(rotary):
            return k_BHLD.narrow(2, span.start, span.stop - span.start)

        def rotate(keys: slice, out_BHLD: Tensor | None = None) -> Tensor:
            part = k_BHLD.narrow(2, keys.start, keys.stop - keys.start)
            cos_LD, sin_LF = self.derived(_frame_tables, keys.start, keys.stop, compute_dtype(k_BHLD), k_BHLD.device)
            return checked(rotary.rotate(part, cos_LD, sin_LF, out=out_BHLD), part, "key")

        return rotate(span) if kept is None else kept.rotated(copy.segment, copy.keys, k_BHLD, rotary, rotate, span)


def _frame_tables(
    frame: Frame, start: int, stop: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos [L, D] and sin [L, F] of the keys ``start .. stop - 1``: all layers of a step ask for the same keys."""
    keys, rotary = frame.copy.keys, frame.rotary
    parts = []
    for positions, first in ((frame.before, frame.span.start), (frame.after, keys.stop)):
        wanted = positions[max(start - first, 0) : max(stop - first, 0)]
        if len(wanted):
            parts.append(rotary.tables(wanted, dtype=dtype, device=device))
    low, high = max(start, keys.start), min(stop, keys.stop) if len(frame.after) else stop
    if low < high:
        cos_LF, sin_LF = key_tables(frame.copy, rotary, dtype, device)
        parts.insert(int(start < keys.start), (cos_LF[low:high], sin_LF[low:high]))
    cos, sin = zip(*parts, strict=True)
    return rotary.both(torch.cat(cos)), torch.cat(sin)


@dataclass(frozen=True, eq=False)
class DecodeCall:
    """One call of the operator: adjacent keys of one frame, in splits of equal length, which may overlap.

    Parameters
    ----------
    frame, key : int
        The number of its frame, and its first key, counted from the frame's first.
    value : int
        Its first key, counted from the first of all.
    length, num_splits : int
        How many keys, in how many splits.
    bias : float [P, 1, R, L] or None
        Hides from a split the keys that the next one attends too.
    """

    frame: int
    key: int
    value: int
    length: int
    num_splits: int
    bias: Tensor | None

    def keys(self, frames: list[Tensor]) -> Tensor:
        """Its rotated keys, [P B, H, L, D]."""
        return self._splits(frames[self.frame], self.key)

    def values(self, v_BHLD: Tensor) -> Tensor:
        """Its values, [P B, H, L, D]."""
        return self._splits(v_BHLD, self.value)

    def _splits(self, x_BHLD: Tensor, first: int) -> Tensor:
        if self.num_splits == 1:
            return x_BHLD.narrow(2, first, self.length)
        (_, heads, _, dim), (_, head, token, channel) = x_BHLD.shape, x_BHLD.stride()
        step, rest = divmod(self.length, self.num_splits)
        shape, strides = (self.num_splits, heads, step + rest, dim), (step * token, head, token, channel)
        return x_BHLD.as_strided(shape, strides, x_BHLD.storage_offset() + first * token)


@dataclass(frozen=True, eq=False)
class DecodeCalls:
    """The calls for a plan's last query, and its rotations: the same for all layers with tensors of one kind.

    Parameters
    ----------
    frames : tuple of Frame
        The keys that the calls read.
    calls : tuple of DecodeCall
        They attend every key of the plan's last query once.
    cos, sin : float [C, 1, 1, 1, D] and [C, 1, 1, 1, F]
        Rotation of the query for every call; with the logits' scale where every channel is rotated.
    factor : float [1] or None
        The logits' scale where it is not in the tables.
    """

    frames: tuple[Frame, ...]
    calls: tuple[DecodeCall, ...]
    cos: Tensor
    sin: Tensor
    factor: Tensor | None


def decode_calls(plan: PositionPlan, rotary: Rotary, q_BH1D: Tensor, k_BHLD: Tensor, scale: float) -> DecodeCalls:
    """The calls for tensors of this kind, worked out once per plan."""
    kind = _Tensors(q_BH1D.dtype, compute_dtype(q_BH1D), q_BH1D.device, q_BH1D.shape[1], k_BHLD.shape)
    return plan.derived(_decode_calls, rotary, scale, kind, torch.get_num_threads())


class _Tensors(NamedTuple):
    """What the calls depend on of a layer's tensors."""

    dtype: torch.dtype
    compute_dtype: torch.dtype
    device: torch.device
    heads: int
    key_shape: torch.Size


def _decode_calls(plan: PositionPlan, rotary: Rotary, scale: float, kind: _Tensors, threads: int) -> DecodeCalls:
    layout = rotation_layout(plan, 1)
    if not layout.queries:
        nothing = torch.empty(0, dtype=kind.dtype, device=kind.device)
        return DecodeCalls((), (), nothing, nothing, None)
    batch, key_heads, _, dim = kind.key_shape
    groups = _groups(layout, GRAIN // (batch * key_heads * dim))
    frames = _frames(layout, groups, rotary)
    numbers, calls = list(frames), []
    for group in groups:
        start, stop = group.interval(layout)
        length = stop - start
        num_splits = threads // math.gcd(key_heads, threads)
        if batch > 1 or length // num_splits < LEAST_KEYS:  # several rows have heads for every thread
            num_splits = 1
        key_copy = group.primary.key_copy
        bias = _bias(length, num_splits, kind)
        calls.append(
            DecodeCall(numbers.index(key_copy), start - frames[key_copy].span.start, start, length, num_splits, bias)
        )
    rotation = _query_rotation([group.primary for group in groups], rotary, scale, kind)
    return DecodeCalls(tuple(frames.values()), tuple(calls), *rotation)


class _Group(NamedTuple):
    """Segments that one call attends: a primary, and the neighbours that are rotated into its frame."""

    primary: QueryCopy
    before: QueryCopy | None = None
    after: QueryCopy | None = None

    def interval(self, layout: RotationLayout) -> tuple[int, int]:
        """The keys of all its segments, counted from the first of all."""
        return _interval(layout, self.before or self.primary)[0], _interval(layout, self.after or self.primary)[1]


def _interval(layout: RotationLayout, copy: QueryCopy) -> tuple[int, int]:
    """The keys that a segment's query attends, counted from the first of all."""
    first = layout.keys[copy.key_copy].keys.start
    return first + int(copy.key_start[0]), first + int(copy.key_stop[0])


def _groups(layout: RotationLayout, few: int) -> list[_Group]:
    """All segments, in as few groups as their places allow; a neighbour has at most ``few`` keys."""
    segments = sorted(layout.queries, key=lambda copy: _interval(layout, copy))
    lengths = [int(copy.key_stop[0] - copy.key_start[0]) for copy in segments]
    users = [copy.key_copy for copy in segments]
    short = [
        length <= few and length < max(lengths) and users.count(copy.key_copy) == 1 and _can_shift(copy)
        for copy, length in zip(segments, lengths, strict=True)
    ]
    free = {index for index, is_short in enumerate(short) if is_short}

    def neighbour(index: int, end: int, key: int) -> QueryCopy | None:
        """Take a short segment that still is free and starts (``end`` 0) or stops (1) at a key."""
        if index not in free or _interval(layout, segments[index])[end] != key:
            return None
        free.discard(index)
        return segments[index]

    groups = []
    for index, primary in enumerate(segments):
        if short[index]:
            continue
        copy, before, after = layout.keys[primary.key_copy], None, None
        if not copy.at_zero and _can_shift(primary):
            start, stop = _interval(layout, primary)
            before = neighbour(index - 1, 1, start) if start == copy.keys.start else None
            after = neighbour(index + 1, 0, stop) if stop == copy.keys.stop else None
        groups.append(_Group(primary, before, after))
    return groups + [_Group(segments[index]) for index in sorted(free)]


def _can_shift(copy: QueryCopy) -> bool:
    """Whether a shift of its positions is a shift of its angles."""
    return copy.segment.interpolation == "positions"


def _frames(layout: RotationLayout, groups: Sequence[_Group], rotary: Rotary) -> dict[int, Frame]:
    """A frame for every copy of the keys that a group reads, by the copy's number."""
    ends: dict[int, list[Positions]] = {}
    for primary, *neighbours in groups:
        positions = ends.setdefault(primary.key_copy, [np.empty(0), np.empty(0)])
        for side, neighbour in enumerate(neighbours):
            if neighbour is not None:
                positions[side] = _in_frame_of(primary, neighbour, layout)
    return {copy: Frame(layout.keys[copy], before, after, rotary) for copy, (before, after) in ends.items()}


def _in_frame_of(primary: QueryCopy, neighbour: QueryCopy, layout: RotationLayout) -> Positions:
    """Positions at which the primary's query sees the neighbour's keys as the neighbour's own query does."""
    keys = slice(*_interval(layout, neighbour))
    positions: Positions = layout.keys[neighbour.key_copy].segment.key_positions[keys]
    shift: Any = primary.positions[0] - neighbour.positions[0]
    moved: Positions = (positions[:, None] if np.ndim(shift) >= positions.ndim else positions) + shift
    return moved


def _bias(length: int, num_splits: int, kind: _Tensors) -> Tensor | None:
    """Hides the keys at the end of a split that the next one attends too, [P, 1, R, L]."""
    step, rest = divmod(length, num_splits)
    if not rest:
        return None
    bias = torch.zeros((num_splits, 1, 1, step + rest), dtype=kind.dtype, device=kind.device)
    bias[:-1, ..., step:] = -math.inf
    return bias.expand(-1, -1, kind.heads // kind.key_shape[1], -1)


def _query_rotation(
    primaries: Sequence[QueryCopy], rotary: Rotary, scale: float, kind: _Tensors
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``cos``, ``sin`` and ``factor`` of :class:`DecodeCalls`."""
    dim = kind.key_shape[3]
    tables = [query_tables(primary, rotary, kind.compute_dtype, kind.device, dim) for primary in primaries]
    cos = rotary.both(torch.stack([table[0] for table in tables])[:, None, None])
    sin = torch.stack([table[1] for table in tables])[:, None, None]
    if rotary.rotated == (0, dim):
        return cos * scale, sin * scale, None
    query_scale = tables[0][2]  # it belongs to the query, so it is the same for all segments
    if query_scale is None:
        return cos, sin, torch.full((1,), scale, dtype=cos.dtype, device=cos.device)
    return cos, sin, query_scale * scale
