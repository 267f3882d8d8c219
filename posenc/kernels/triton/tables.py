"""What the prefill kernel reads of a plan, on the device: intervals, places in the buffers, angles.

Worked out once per plan and shared by all layers.

Shape letters: L the last queries of a plan, S segments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posenc.kernels.rotated import rotation_layout
from posenc.kernels.triton.angles import Angles, angles, key_angles
from posenc.kernels.triton.upload import uploaded_together
from posenc.plan import PositionPlan
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
class BufferRows:
    """A run of rows of a buffer of rotated rows: which queries or keys they are, and their angles."""

    rows: slice
    angles: Angles

    @property
    def count(self) -> int:
        """How many rows."""
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True, eq=False)
class PrefillTables:
    """The last queries of one plan for the prefill kernel.

    Parameters
    ----------
    intervals_S2L : int32
        Every segment's key_start and key_stop, counted in its copy of the keys.
    segments_S3 : int64
        Where its copy lies in the buffer of rotated keys and among the values, and how far the row of a query
        in the buffer of rotated queries is from the query's own number.
    factors_L : float32 or None
        The plan's ``query_scale``.
    queries, keys : tuple of BufferRows
        What the two buffers hold, one after the other.
    """

    intervals_S2L: Tensor
    segments_S3: Tensor
    factors_L: Tensor | None
    queries: tuple[BufferRows, ...]
    keys: tuple[BufferRows, ...]


def prefill_tables(plan: PositionPlan, q_len: int, rotary: Rotary, device: torch.device) -> PrefillTables | None:
    """Tables for the prefill kernel, worked out once per plan; None where the queries attend nothing."""
    return plan.derived(_prefill_tables, q_len, rotary, device)


def _prefill_tables(plan: PositionPlan, q_len: int, rotary: Rotary, device: torch.device) -> PrefillTables | None:
    layout = rotation_layout(plan, q_len)
    if not layout.queries:
        return None
    keys = []
    for key_copy in layout.keys:
        table, offset = key_angles(key_copy.segment, rotary, device)
        rows = slice(offset + key_copy.keys.start, offset + key_copy.keys.stop)
        keys.append(BufferRows(key_copy.keys, table.of(rows)))
    places = np.cumsum([0, *(rows.count for rows in keys)])
    intervals_S2L = np.zeros((len(layout.queries), 2, q_len), dtype=np.int32)
    segments_S3 = np.empty((len(layout.queries), 3), dtype=np.int64)
    queries, place = [], 0
    for number, copy in enumerate(layout.queries):
        intervals_S2L[number, 0, copy.rows], intervals_S2L[number, 1, copy.rows] = copy.key_start, copy.key_stop
        segments_S3[number] = places[copy.key_copy], keys[copy.key_copy].rows.start, place - copy.rows.start
        table = angles(copy.positions, rotary, device, interpolation=copy.segment.interpolation)
        queries.append(BufferRows(copy.rows, table))
        place += len(copy.positions)
    factors = [] if plan.query_scale is None else [query_factors(plan, q_len)]
    intervals, segments, *factors_on_device = uploaded_together([intervals_S2L, segments_S3, *factors], device)
    factors_L = factors_on_device[0] if factors else None
    return PrefillTables(intervals, segments, factors_L, tuple(queries), tuple(keys))


def query_factors(plan: PositionPlan, q_len: int) -> NDArray[np.float32]:
    """The plan's factors on the logits of its last queries, float32 [L]."""
    if plan.query_scale is None:
        return np.ones(q_len, dtype=np.float32)
    return plan.query_scale[plan.total - q_len :].astype(np.float32)
