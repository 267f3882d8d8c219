"""Raw queries and keys turned into the rotated copies that the segments of a plan need.

Segments whose key positions differ by a constant share one rotated copy of the keys where their keys
overlap: the constant moves to the query side. Shape letters: B batch, H heads, L tokens, D head_dim, F frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posenc.derived import Derivable
from posenc.errors import BackendError
from posenc.kernels.devices import capturing
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.plan import PositionPlan
from posenc.rope import Rotary
from posenc.segment import IntArray, Positions, Segment


@dataclass(frozen=True, eq=False)
class Work(Derivable):
    """One segment for the last ``Lq`` queries.

    ``key_start`` and ``key_stop`` are those queries' key intervals, int64 [rows], counted from the
    first key of the copy; ``rows`` says which of the ``Lq`` queries they are; ``scale`` are their factors on the
    logits, float64 [rows], or None.
    """

    segment: Segment
    rows: slice
    copy: int
    key_start: IntArray
    key_stop: IntArray
    query_positions: Positions
    scale: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class KeyCopy:
    """A range of keys rotated by one position map; ``still`` where all positions are 0."""

    segment: Segment
    keys: slice
    still: bool

    def is_raw(self, rotary: Rotary) -> bool:
        """Whether the raw keys are its keys."""
        return self.still and rotary.attention_scaling == 1.0


@dataclass(frozen=True, eq=False)
class Layout:
    """Which rotated copies a plan needs for its last ``Lq`` queries, and who reads which."""

    work: tuple[Work, ...]
    copies: tuple[KeyCopy, ...]


def layout(plan: PositionPlan, q_len: int) -> Layout:
    """Work out (once per plan) the copies for the last ``q_len`` queries."""
    return plan.derived(_layout, q_len)


def _layout(plan: PositionPlan, q_len: int) -> Layout:
    first = plan.total - q_len
    owners: list[Segment] = []
    ranges: list[list[int]] = []
    drafts: list[tuple[Segment, slice, int, Positions]] = []
    for segment in plan.segments:
        used = (segment.key_stop[first:] > segment.key_start[first:]).nonzero()[0]
        if not len(used):
            continue
        rows = slice(int(used[0]), int(used[-1]) + 1)
        inside = slice(first + rows.start, first + rows.stop)
        low, high = int(segment.key_start[first + used[0]]), int(segment.key_stop[first + used[-1]])
        query = segment.query_positions[inside]
        for copy, owner in enumerate(owners):
            if low > ranges[copy][1] or high < ranges[copy][0]:
                continue  # sharing would rotate the keys between, which nobody reads
            shift = _constant_shift(segment, owner)
            if shift is not None:
                query = query - shift if shift else query
                ranges[copy] = [min(ranges[copy][0], low), max(ranges[copy][1], high)]
                break
        else:
            copy = len(owners)
            owners.append(segment)
            ranges.append([low, high])
        drafts.append((segment, rows, copy, query))
    work = tuple(
        Work(
            segment,
            rows,
            copy,
            segment.key_start[first + rows.start : first + rows.stop] - ranges[copy][0],
            segment.key_stop[first + rows.start : first + rows.stop] - ranges[copy][0],
            query,
            None if plan.query_scale is None else plan.query_scale[first + rows.start : first + rows.stop],
        )
        for segment, rows, copy, query in drafts
    )
    copies = (
        KeyCopy(owner, slice(low, high), _all_zero(owner.key_positions[low:high]))
        for owner, (low, high) in zip(owners, ranges, strict=True)
    )
    return Layout(work, tuple(copies))


def _constant_shift(segment: Segment, owner: Segment) -> float | None:
    """``c`` with which the segment's key positions are the owner's plus ``c`` everywhere, or None."""
    positions, others = segment.key_positions, owner.key_positions
    if segment.interpolation != owner.interpolation:
        return None
    if positions is others:
        return 0.0
    if positions.shape != others.shape or np.any(positions[0] - others[0] != positions[-1] - others[-1]):
        return None
    (root, offset), (other_root, other_offset) = segment.root, owner.root
    if offset == other_offset and len(positions) < len(root.key_positions) == len(other_root.key_positions):
        # Slices of two longer maps: those are compared once, not at every step of a decoding.
        shift = root.derived(_constant_shift, other_root)
        if shift is not None:
            return shift
    difference = positions - others
    shift = difference.flat[0]
    if segment.interpolation == "logits" and shift % 1:
        return None  # a query moved by a fraction would be mixed as well
    return float(shift) if bool((difference == shift).all()) else None


def _all_zero(positions: Positions) -> bool:
    """Whether all positions are 0; the last one tells most maps apart at once."""
    return not (np.any(positions[-1]) or positions.any())


def rotated_keys(copy: KeyCopy, k_BHLD: Tensor, rotary: Rotary, kept: RotatedKeyCache | None = None) -> Tensor:
    """The keys of one copy, rotated. ``kept`` holds what earlier steps have rotated already."""
    if copy.is_raw(rotary):
        return k_BHLD[:, :, copy.keys]
    cos_LF, sin_LF = key_tables(copy, rotary, compute_dtype(k_BHLD), k_BHLD.device)

    def rotate(keys: slice, out_BHLD: Tensor | None = None) -> Tensor:
        return checked(rotary.rotate(k_BHLD[:, :, keys], cos_LF[keys], sin_LF[keys], out=out_BHLD), k_BHLD, "key")

    return rotate(copy.keys) if kept is None else kept.rotated(copy.segment, copy.keys, k_BHLD, rotary, rotate)


def key_tables(copy: KeyCopy, rotary: Rotary, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of a copy's map, from the plan's first key on: shared by every layer and every later step."""
    root, offset = copy.segment.root
    cos_LF, sin_LF = root.derived(_key_tables, rotary, dtype, device)
    return cos_LF[offset:], sin_LF[offset:]


def _key_tables(segment: Segment, rotary: Rotary, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return rotary.tables(segment.key_positions, interpolation=segment.interpolation, dtype=dtype, device=device)


def rotated_queries(work: Work, q_BHLD: Tensor, rotary: Rotary, out_BHLD: Tensor | None = None) -> Tensor:
    """The queries of one segment, rotated and scaled by the plan's ``query_scale``.

    ``out_BHLD`` is memory of the shape of ``q_BHLD`` that may be used for the result.
    """
    rows = q_BHLD[:, :, work.rows]
    kind = compute_dtype(q_BHLD), q_BHLD.device, q_BHLD.shape[-1]
    cos_LF, sin_LF, factor_L1 = work.derived(query_tables, rotary, *kind)
    if factor_L1 is not None:
        scaled = rotary.rotate(rows.to(cos_LF.dtype) * factor_L1, cos_LF, sin_LF)
        return checked(scaled.to(q_BHLD.dtype), rows, "query")
    out = None if out_BHLD is None else out_BHLD[:, :, : rows.shape[2]]
    return checked(rotary.rotate(rows, cos_LF, sin_LF, out=out), rows, "query")


def query_tables(
    work: Work, rotary: Rotary, dtype: torch.dtype, device: torch.device, head_dim: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos and sin [L, F] of a segment's queries, and their scale [L, 1] where cos and sin do not carry it.

    They carry it where the whole head is rotated: other channels would miss it. Call it through ``work.derived``.
    """
    cos_LF, sin_LF = rotary.tables(
        work.query_positions, interpolation=work.segment.interpolation, dtype=dtype, device=device
    )
    if work.scale is None:
        return cos_LF, sin_LF, None
    scale_L1 = torch.as_tensor(np.ascontiguousarray(work.scale)).to(device, dtype)[:, None]
    if rotary.rotated == (0, head_dim):
        return cos_LF * scale_L1, sin_LF * scale_L1, None
    return cos_LF, sin_LF, scale_L1


def compute_dtype(x: Tensor) -> torch.dtype:
    """Rotations and merges are computed in float32, or in float64 for float64 inputs."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def checked(rotated: Tensor, source: Tensor, what: str) -> Tensor:
    """Raise where rotation left the range of float16; NaN and inf of the caller pass through.

    On a GPU this waits for the rotation: once, and a second time only where something is not finite. While a CUDA
    graph is captured nothing may wait, so nothing is checked: there an overflow shows as inf or NaN in the output. Who
    captures a graph of a float16 model runs it once before, or takes bfloat16, which does not overflow.
    """
    if rotated.dtype != torch.float16 or capturing(rotated.device):
        return rotated
    if not rotated.isfinite().all() and source.isfinite().all():
        raise BackendError(f"float16 overflow: a rotated {what} exceeds 65504. Run the model in bfloat16 or float32.")
    return rotated
