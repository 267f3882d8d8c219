"""One query per row on torch's CPU flash operator: what decoding a token runs in every layer.

An operation that torch distributes over threads takes longer to start than a short segment takes to compute. So
at every step the keys of short segments are rotated into the frame of a long neighbour, the primary, whose query then
serves both, and one call reads them together. What does not depend on a layer's tensors is worked out once per plan
and kept there. The segments of a plan, in the order of their keys::

    keys      |    tail    |           middle            |    head    |
    role        neighbour             primary              neighbour
    rotated     every step    when new, then kept          every step
    read      [          split 0          |          split 1          ]    merged by logsumexp

Shape letters: B batch, H heads, S reads, R query heads of a key/value head, P splits of a read, L tokens,
D head_dim, F frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from posenc.derived import Derivable
from posenc.kernels.merge import merge_all
from posenc.kernels.rotated import KeyCopy, Layout, Work, checked, compute_dtype, key_tables, layout, query_tables
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.plan import PositionPlan
from posenc.rope import Rotary
from posenc.segment import Positions

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

GRAIN = 2**15
"""Elements from which torch shares an operation out to threads."""

LEAST_KEYS = 1024
"""Keys worth a thread of their own."""


@dataclass(frozen=True, eq=False)
class Frame(Derivable):
    """A rotated copy and, at its edges, the keys of short segments turned into its frame.

    Parameters
    ----------
    copy : KeyCopy
        Keys of one map, which can be kept from step to step.
    before, after : Positions
        Positions of the turned keys on either side of it, which hold for one query.
    rotary : Rotary
        Turns them.
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
        """The keys of its span, rotated [B, H, L, D]."""
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
    """cos [L, D] and sin [L, F] of the keys ``start .. stop - 1``: every layer of a step asks for the same."""
    own, span, rotary = frame.copy.keys, frame.span, frame.rotary
    parts = []
    for positions, first in ((frame.before, span.start), (frame.after, own.stop)):
        wanted = positions[max(start - first, 0) : max(stop - first, 0)]
        if len(wanted):
            parts.append(rotary.tables(wanted, dtype=dtype, device=device))
    low, high = max(start, own.start), min(stop, own.stop) if len(frame.after) else stop
    if low < high:
        cos_LF, sin_LF = key_tables(frame.copy, rotary, dtype, device)
        parts.insert(int(start < own.start), (cos_LF[low:high], sin_LF[low:high]))
    cos, sin = zip(*parts, strict=True)
    return rotary.both(torch.cat(cos)), torch.cat(sin)


@dataclass(frozen=True, eq=False)
class Read:
    """Neighbouring keys of one frame that one call reads, in ``pieces`` of equal length which may overlap.

    Parameters
    ----------
    frame, key : int
        Where its keys are: the first one counted from the frame's first.
    value : int
        The first one counted from the first key of all.
    length, pieces : int
        Keys, and pieces they are read in.
    bias : float [P, 1, R, L] or None
        Hides what two pieces share from one of them.
    """

    frame: int
    key: int
    value: int
    length: int
    pieces: int
    bias: Tensor | None

    def keys(self, frames: list[Tensor]) -> Tensor:
        """[P B, H, L, D] of the rotated keys."""
        return self._of(frames[self.frame], self.key)

    def values(self, v_BHLD: Tensor) -> Tensor:
        """[P B, H, L, D] of all values."""
        return self._of(v_BHLD, self.value)

    def _of(self, x_BHLD: Tensor, first: int) -> Tensor:
        if self.pieces == 1:
            return x_BHLD.narrow(2, first, self.length)
        (_, heads, _, dim), (_, head, token, channel) = x_BHLD.shape, x_BHLD.stride()
        step, rest = divmod(self.length, self.pieces)
        shape, strides = (self.pieces, heads, step + rest, dim), (step * token, head, token, channel)
        return x_BHLD.as_strided(shape, strides, x_BHLD.storage_offset() + first * token)


@dataclass(frozen=True, eq=False)
class QueryCalls:
    """What a plan's last query reads, and its rotations: the same for every layer of a kind.

    Parameters
    ----------
    cos, sin : float [S, 1, 1, 1, D] and [S, 1, 1, 1, F]
        Rotation of the query for every read; with the logits' scale where every channel is rotated.
    factor : float [1] or None
        The logits' scale where it is not in the tables.
    """

    frames: tuple[Frame, ...]
    reads: tuple[Read, ...]
    cos: Tensor
    sin: Tensor
    factor: Tensor | None


def query_calls(plan: PositionPlan, rotary: Rotary, q_BH1D: Tensor, k_BHLD: Tensor, scale: float) -> QueryCalls:
    """The calls for tensors of this kind, worked out once per plan."""
    case = _Case(q_BH1D.dtype, compute_dtype(q_BH1D), q_BH1D.device, q_BH1D.shape, k_BHLD.shape)
    return plan.derived(_query_calls, rotary, scale, case, torch.get_num_threads())


class _Case(NamedTuple):
    """What the calls depend on of a layer's tensors; ``precise`` is the dtype that rotations are computed in."""

    dtype: torch.dtype
    precise: torch.dtype
    device: torch.device
    query_shape: torch.Size
    key_shape: torch.Size


def _query_calls(plan: PositionPlan, rotary: Rotary, scale: float, case: _Case, threads: int) -> QueryCalls:
    arranged = layout(plan, 1)
    if not arranged.work:
        nothing = torch.empty(0, dtype=case.dtype, device=case.device)
        return QueryCalls((), (), nothing, nothing, None)
    (batch, key_heads, _, dim), heads = case.key_shape, case.query_shape[1]
    calls = _hosts(arranged, GRAIN // (batch * key_heads * dim))
    edges: dict[int, list[Positions]] = {}
    for host, *sides in calls:
        own = edges.setdefault(host.copy, [np.empty(0), np.empty(0)])
        for number, guest in enumerate(sides):
            if guest is not None:
                own[number] = _turned(arranged, host, guest)
    frames = {copy: Frame(arranged.copies[copy], own[0], own[1], rotary) for copy, own in edges.items()}
    order, reads, tables = list(frames), [], []
    for host, before, after in calls:
        first, stop = _interval(arranged, before or host)[0], _interval(arranged, after or host)[1]
        pieces = threads // math.gcd(key_heads, threads)
        if batch > 1 or (stop - first) // pieces < LEAST_KEYS:  # several rows have heads for every thread
            pieces = 1
        bias = _bias(stop - first, pieces, heads // key_heads, case.dtype, case.device)
        at = first - frames[host.copy].span.start
        reads.append(Read(order.index(host.copy), at, first, stop - first, pieces, bias))
        tables.append(host.derived(query_tables, rotary, case.precise, case.device, dim))
    cos = rotary.both(torch.stack([table[0] for table in tables])[:, None, None])
    sin = torch.stack([table[1] for table in tables])[:, None, None]
    factor = tables[0][2]  # the scale belongs to the query, not to the segment
    if rotary.rotated == (0, dim):
        cos, sin = cos * scale, sin * scale
    else:
        factor = torch.full((1,), scale, dtype=cos.dtype, device=cos.device) if factor is None else factor * scale
    return QueryCalls(tuple(frames.values()), tuple(reads), cos, sin, factor)


def _interval(arranged: Layout, work: Work) -> tuple[int, int]:
    """The keys a segment reads, counted from the first of all."""
    first = arranged.copies[work.copy].keys.start
    return first + int(work.key_start[0]), first + int(work.key_stop[0])


def _hosts(arranged: Layout, few: int) -> list[tuple[Work, Work | None, Work | None]]:
    """Segments that get a call, each with neighbours of at most ``few`` keys, before and after it, that it takes in."""
    works = sorted(arranged.work, key=lambda work: _interval(arranged, work))
    lengths = [int(work.key_stop[0] - work.key_start[0]) for work in works]
    users = [work.copy for work in works]
    small = [
        length <= few and length < max(lengths) and users.count(work.copy) == 1 and _turns(work)
        for work, length in zip(works, lengths, strict=True)
    ]
    found: list[tuple[Work, Work | None, Work | None]] = []
    free = {index for index, own in enumerate(small) if own}

    def guest(index: int, at: int, edge: int) -> Work | None:
        if index not in free or _interval(arranged, works[index])[at] != edge:
            return None
        free.discard(index)
        return works[index]

    for index, host in enumerate(works):
        copy = arranged.copies[host.copy]
        if small[index]:
            continue
        if copy.still or not _turns(host):
            found.append((host, None, None))
            continue
        low, high = _interval(arranged, host)
        before = guest(index - 1, 1, low) if low == copy.keys.start else None
        after = guest(index + 1, 0, high) if high == copy.keys.stop else None
        found.append((host, before, after))
    return found + [(works[index], None, None) for index in sorted(free)]


def _turns(work: Work) -> bool:
    """Whether a shift of its positions is a shift of its angles."""
    return work.segment.interpolation == "positions"


def _turned(arranged: Layout, host: Work, guest: Work) -> Positions:
    """Positions at which the host's query sees the guest's keys as the guest's own query does."""
    positions: Positions = arranged.copies[guest.copy].segment.key_positions[slice(*_interval(arranged, guest))]
    shift: Any = host.query_positions[0] - guest.query_positions[0]
    moved: Positions = (positions[:, None] if np.ndim(shift) >= positions.ndim else positions) + shift
    return moved


def _bias(length: int, pieces: int, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What hides the keys at the end of a piece that the next one reads too."""
    step, rest = divmod(length, pieces)
    if not rest:
        return None
    bias = torch.zeros((pieces, 1, 1, step + rest), dtype=dtype, device=device)
    bias[:-1, ..., step:] = -math.inf
    return bias.expand(-1, -1, rows, -1)


def attend_one(
    q_BH1D: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    plan: PositionPlan,
    rotary: Rotary,
    scale: float,
    kept: RotatedKeyCache | None,
) -> tuple[Tensor, Tensor]:
    """The query heads of a key/value head are the rows of one call: keys are read once."""
    batch, heads, _, _ = q_BH1D.shape
    key_heads, width = k_BHLD.shape[1], v_BHLD.shape[-1]
    calls = query_calls(plan, rotary, q_BH1D, k_BHLD, scale)
    if not calls.reads:
        lse = q_BH1D.new_full((batch, heads, 1), -math.inf, dtype=compute_dtype(q_BH1D))
        return q_BH1D.new_zeros((batch, heads, 1, width)), lse
    frames = [pad(frame.rotated(k_BHLD, kept), width) for frame in calls.frames]
    shape = (-1, batch, key_heads, heads // key_heads, width)
    queries_SBHRD = pad(_rotated_query(calls, q_BH1D, rotary), width).view(shape)
    parts = [
        flash(
            q_BHRD.expand(read.pieces * batch, -1, -1, -1),
            read.keys(frames),
            read.values(v_BHLD),
            attn_mask=read.bias,
            scale=1.0,
        )
        for q_BHRD, read in zip(queries_SBHRD.unbind(), calls.reads, strict=True)
    ]
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if len(out) > batch:
        out, lse = merge_all(out.view(shape), lse.view(shape[:-1]))
    return out.reshape(batch, heads, 1, width), lse.reshape(batch, heads, 1)


def _rotated_query(calls: QueryCalls, q_BH1D: Tensor, rotary: Rotary) -> Tensor:
    """The query as every read sees it, times the logits' scale, [S, B, H, 1, D]."""
    q = q_BH1D if calls.factor is None else q_BH1D.to(calls.cos.dtype) * calls.factor
    q_SBH1D = q.expand(len(calls.cos), -1, -1, -1, -1)
    return checked(rotary.rotate(q_SBH1D, calls.cos, calls.sin).to(q_BH1D.dtype), q_BH1D, "query")


def adjacent(x: Tensor) -> Tensor:
    """The tensor, or a copy whose channels lie side by side: the operator reads them so, whatever their stride."""
    *others, channel = x.stride()
    # A smaller stride than the channels take would become the innermost one when the tensor is rotated.
    whole = channel == 1 and all(stride == 0 or stride >= x.shape[-1] for stride in others)
    return x if whole else x.contiguous()


def pad(x: Tensor, width: int) -> Tensor:
    """Zero channels up to ``width``: the operator wants one head_dim for query, key and value."""
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
