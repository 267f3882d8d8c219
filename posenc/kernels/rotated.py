"""The rotated copies of queries and keys that a plan needs.

A query is rotated once for each segment that it attends in. A key is rotated once for each position map: segments whose
key positions differ by a constant share one copy where their keys overlap, and the constant moves to the query side::

    plan ----- rotation_layout ----- a QueryCopy for each segment, a KeyCopy for each map
                                         |
    raw q, k ----------------------- rotated_queries, rotated_keys ----- what the kernels attend

Shape letters: B batch, H heads, L tokens, D head_dim, F rotary frequencies.
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
class QueryCopy(Derivable):
    """The queries of one segment, and the keys that each of them attends.

    Parameters
    ----------
    segment : Segment
        Where they come from.
    rows : slice
        Which of the last ``Lq`` queries they are.
    key_copy : int
        The :class:`KeyCopy` that they attend, by its number in the layout.
    key_start, key_stop : int64 [rows]
        Their key intervals, counted from the first key of the copy.
    positions : int64 or float64, [rows] or [rows, F]
        Rotary positions, moved to the map of the copy.
    scale : float64 [rows] or None
        Their factors on the logits: the plan's ``query_scale``.
    """

    segment: Segment
    rows: slice
    key_copy: int
    key_start: IntArray
    key_stop: IntArray
    positions: Positions
    scale: NDArray[np.float64] | None


@dataclass(frozen=True, eq=False)
class KeyCopy:
    """A range of keys, rotated by one position map.

    Parameters
    ----------
    segment : Segment
        Its key positions are the map.
    keys : slice
        Which of the plan's keys.
    at_zero : bool
        All positions are 0, so that nothing rotates.
    """

    segment: Segment
    keys: slice
    at_zero: bool

    def is_raw(self, rotary: Rotary) -> bool:
        """Whether the rotated keys are the raw keys."""
        return self.at_zero and rotary.attention_scaling == 1.0


@dataclass(frozen=True, eq=False)
class RotationLayout:
    """The rotated copies that a plan needs for its last ``Lq`` queries."""

    queries: tuple[QueryCopy, ...]
    keys: tuple[KeyCopy, ...]


def rotation_layout(plan: PositionPlan, q_len: int) -> RotationLayout:
    """The copies for the last ``q_len`` queries, worked out once per plan."""
    return plan.derived(_rotation_layout, q_len)


def _rotation_layout(plan: PositionPlan, q_len: int) -> RotationLayout:
    first = plan.total - q_len
    maps: list[_KeyMap] = []
    places: list[tuple[Segment, slice, int, Positions]] = []
    for segment in plan.segments:
        live = (segment.key_stop[first:] > segment.key_start[first:]).nonzero()[0]
        if not len(live):
            continue
        inside = slice(first + int(live[0]), first + int(live[-1]) + 1)
        low, high = int(segment.key_start[inside.start]), int(segment.key_stop[inside.stop - 1])
        key_copy, shift = _add(maps, segment, low, high)
        positions = segment.query_positions[inside]
        places.append((segment, inside, key_copy, positions - shift if shift else positions))
    queries = (
        QueryCopy(
            segment,
            slice(inside.start - first, inside.stop - first),
            key_copy,
            segment.key_start[inside] - maps[key_copy].low,
            segment.key_stop[inside] - maps[key_copy].low,
            positions,
            None if plan.query_scale is None else plan.query_scale[inside],
        )
        for segment, inside, key_copy, positions in places
    )
    keys = (KeyCopy(m.segment, slice(m.low, m.high), _all_zero(m.segment.key_positions[m.low : m.high])) for m in maps)
    return RotationLayout(tuple(queries), tuple(keys))


@dataclass
class _KeyMap:
    """The keys ``low .. high - 1`` under the map of a segment; the range grows while segments are added."""

    segment: Segment
    low: int
    high: int


def _add(maps: list[_KeyMap], segment: Segment, low: int, high: int) -> tuple[int, float]:
    """Add a segment's keys to a map that serves it, or else to one of its own: the map's number, and the shift."""
    for number, shared in enumerate(maps):
        if low > shared.high or high < shared.low:
            continue  # sharing would rotate the keys in between, which no segment attends
        shift = _constant_shift(segment, shared.segment)
        if shift is not None:
            shared.low, shared.high = min(shared.low, low), max(shared.high, high)
            return number, shift
    maps.append(_KeyMap(segment, low, high))
    return len(maps) - 1, 0.0


def _constant_shift(segment: Segment, other: Segment) -> float | None:
    """``c`` where the segment's key positions are everywhere those of the other plus ``c``; else None."""
    positions, others = segment.key_positions, other.key_positions
    if segment.interpolation != other.interpolation:
        return None
    if positions is others:
        return 0.0
    if positions.shape != others.shape or np.any(positions[0] - others[0] != positions[-1] - others[-1]):
        return None
    (root, offset), (other_root, other_offset) = segment.root, other.root
    if offset == other_offset and len(positions) < len(root.key_positions) == len(other_root.key_positions):
        # Slices of two longer maps: those are compared once, not at every decoding step.
        shift = root.derived(_constant_shift, other_root)
        if shift is not None:
            return shift
    difference = positions - others
    shift = difference.flat[0]
    if segment.interpolation == "logits" and shift % 1:
        return None  # the logits of a query that moves by a fraction would be interpolated once more
    return float(shift) if bool((difference == shift).all()) else None


def _all_zero(positions: Positions) -> bool:
    """Whether all positions are 0; for most maps the last one answers."""
    return not (np.any(positions[-1]) or positions.any())


def rotated_keys(copy: KeyCopy, k_BHLD: Tensor, rotary: Rotary, kept: RotatedKeyCache | None = None) -> Tensor:
    """The keys of one copy, rotated; only those that ``kept`` does not hold from earlier steps are computed."""
    if copy.is_raw(rotary):
        return k_BHLD[:, :, copy.keys]
    cos_LF, sin_LF = key_tables(copy, rotary, compute_dtype(k_BHLD), k_BHLD.device)

    def rotate(keys: slice, out_BHLD: Tensor | None = None) -> Tensor:
        return checked(rotary.rotate(k_BHLD[:, :, keys], cos_LF[keys], sin_LF[keys], out=out_BHLD), k_BHLD, "key")

    return rotate(copy.keys) if kept is None else kept.rotated(copy.segment, copy.keys, k_BHLD, rotary, rotate)


def key_tables(copy: KeyCopy, rotary: Rotary, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of a copy's map, from the plan's first key on: shared by all layers and all later steps."""
    root, offset = copy.segment.root
    cos_LF, sin_LF = root.derived(_key_tables, rotary, dtype, device)
    return cos_LF[offset:], sin_LF[offset:]


def _key_tables(segment: Segment, rotary: Rotary, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return rotary.tables(segment.key_positions, interpolation=segment.interpolation, dtype=dtype, device=device)


def rotated_queries(copy: QueryCopy, q_BHLD: Tensor, rotary: Rotary, out_BHLD: Tensor | None = None) -> Tensor:
    """The queries of one segment, rotated and times their ``scale``.

    Parameters
    ----------
    q_BHLD : Tensor
        All ``Lq`` raw queries.
    out_BHLD : Tensor, optional
        Memory of the shape of ``q_BHLD`` that the result may be written to.
    """
    rows = q_BHLD[:, :, copy.rows]
    cos_LF, sin_LF, scale_L1 = query_tables(copy, rotary, compute_dtype(q_BHLD), q_BHLD.device, q_BHLD.shape[-1])
    if scale_L1 is not None:
        scaled = rotary.rotate(rows.to(cos_LF.dtype) * scale_L1, cos_LF, sin_LF)
        return checked(scaled.to(q_BHLD.dtype), rows, "query")
    out = None if out_BHLD is None else out_BHLD[:, :, : rows.shape[2]]
    return checked(rotary.rotate(rows, cos_LF, sin_LF, out=out), rows, "query")


def query_tables(
    copy: QueryCopy, rotary: Rotary, dtype: torch.dtype, device: torch.device, head_dim: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos and sin [L, F] of a copy's queries, and their scale [L, 1] where cos and sin do not carry it.

    They carry it where every channel of the head is rotated: other channels would miss it.
    """
    return copy.derived(_query_tables, rotary, dtype, device, head_dim)


def _query_tables(
    copy: QueryCopy, rotary: Rotary, dtype: torch.dtype, device: torch.device, head_dim: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    cos_LF, sin_LF = rotary.tables(copy.positions, interpolation=copy.segment.interpolation, dtype=dtype, device=device)
    if copy.scale is None:
        return cos_LF, sin_LF, None
    scale_L1 = torch.as_tensor(np.ascontiguousarray(copy.scale)).to(device, dtype)[:, None]
    if rotary.rotated == (0, head_dim):
        return cos_LF * scale_L1, sin_LF * scale_L1, None
    return cos_LF, sin_LF, scale_L1


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of rotations and merges: float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def checked(rotated: Tensor, raw: Tensor, what: str) -> Tensor:
    """Raise where a rotation left the range of float16; a NaN or an infinity of the caller's passes through.

    On a GPU this waits for the rotation: once, and a second time only where something is not finite. While a CUDA graph
    is captured nothing may wait, so nothing is checked: there an overflow shows as inf or NaN in the output. Run a
    float16 model once before its graph is captured, or use bfloat16, which does not overflow.

    Parameters
    ----------
    rotated, raw : Tensor
        After and before the rotation.
    what : str
        ``"query"`` or ``"key"``, for the message.

    Raises
    ------
    BackendError
        If ``rotated`` has an element that is not finite and ``raw`` has none.
    """
    if rotated.dtype != torch.float16 or capturing(rotated.device):
        return rotated
    if not rotated.isfinite().all() and raw.isfinite().all():
        raise BackendError(f"float16 overflow: a rotated {what} exceeds 65504. Run the model in bfloat16 or float32.")
    return rotated
