"""The plan: which positions each (query, key) pair is seen at.

Pure numpy, no model, no torch: this is the one data type between strategies, adapters and backends.

Shape letters: L = total tokens, F = rotary frequencies (rotary_dim // 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from posenc.errors import InvalidInputError
from posenc.plan_check import check_columns, check_partition, check_scale_array, check_segment_arrays, check_values

IntArray = NDArray[np.int64]
Positions = NDArray[Any]  # int64 or float64, [L] or [L, F]
Interpolation = Literal["positions", "logits"]


@dataclass(frozen=True)
class Lengths:
    """Prompt and current length in tokens, padding not counted.

    Parameters
    ----------
    prompt : int
        ``P``, the length the plan is made for, at least 1.
    total : int
        ``N``, the current length, at least ``prompt``.

    Raises
    ------
    InvalidInputError
        If a length is not an integer or out of range.
    """

    prompt: int
    total: int

    def __post_init__(self) -> None:
        for name, value in (("prompt", self.prompt), ("total", self.total)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer):
                raise InvalidInputError(
                    f"{name} must be a whole number of tokens, got {value!r} ({type(value).__name__})."
                )
        if self.prompt < 1:
            raise InvalidInputError(f"prompt must be at least 1 token, got {self.prompt}.")
        if self.total < self.prompt:
            raise InvalidInputError(
                f"total ({self.total}) must be at least prompt ({self.prompt}): it counts the prompt "
                "and the tokens generated after it."
            )

    @property
    def indices(self) -> IntArray:
        """``0 .. total - 1``, int64 [total]."""
        return np.arange(self.total, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Segment:
    """A set of (query, key) pairs that share one position map.

    Parameters
    ----------
    name : str
        Shown in tables and failure messages.
    key_start, key_stop : int64 [L]
        Query ``i`` attends the keys ``key_start[i] <= j < key_stop[i]``; both bounds are
        non-decreasing in ``i``, and an empty interval has ``key_start[i] >= key_stop[i]``.
    query_positions, key_positions : int64 or float64, [L] or [L, F]
        Rotary positions used inside the segment; the model sees ``q[i] - k[j]``.
    interpolation : {"positions", "logits"}
        What a fractional position means: rotation by the fraction (position interpolation), or the logits of the
        two whole positions beside it, mixed linearly (logit interpolation).
    """

    name: str
    key_start: IntArray
    key_stop: IntArray
    query_positions: Positions
    key_positions: Positions
    interpolation: Interpolation = "positions"
    origin: tuple[Segment, int] | None = field(default=None, repr=False)
    """The segment this one is a slice of and where the slice starts: cos/sin tables are shared along it."""
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What backends derive from the positions once; never part of the segment's meaning."""

    @classmethod
    def band(
        cls,
        name: str,
        total: int,
        nearest: int,
        farthest: int | None,
        query: Positions,
        key: Positions,
        interpolation: Interpolation = "positions",
    ) -> Segment:
        """The pairs with ``nearest <= i - j < farthest`` (``None``: no far end)."""
        # In place: at a million tokens touching fresh memory costs more than the arithmetic.
        stop = np.arange(1 - nearest, total + 1 - nearest, dtype=np.int64)
        if nearest > 1:
            np.maximum(stop, 0, out=stop)
        if farthest is None:
            return cls(name, np.zeros(total, dtype=np.int64), stop, query, key, interpolation)
        start = np.arange(1 - farthest, total + 1 - farthest, dtype=np.int64)
        np.maximum(start, 0, out=start)
        np.minimum(start, stop, out=start)
        return cls(name, start, stop, query, key, interpolation)

    @property
    def total(self) -> int:
        """Number of queries (and keys) the segment is defined over."""
        return len(self.key_start)

    @property
    def is_empty(self) -> bool:
        """True when no query attends any key through this segment."""
        return bool((self.key_stop <= self.key_start).all())

    @cached_property
    def keeps_distance(self) -> bool:
        """True when the map shows every pair at its true distance ``i - j``."""
        if self.query_positions.ndim > 1 or self.key_positions.ndim > 1:
            return False
        used = self.key_stop > self.key_start
        if not used.any():
            return True
        index = np.arange(self.total)
        query_shift = (self.query_positions - index)[used]
        lowest, highest = int(self.key_start[used].min()), int(self.key_stop[used].max())
        key_shift = (self.key_positions - index)[lowest:highest]
        if self.interpolation == "logits" and key_shift[0] % 1:
            return False  # mixing the neighbours of two fractions is not their difference
        return bool((query_shift == key_shift[0]).all() and (key_shift == key_shift[0]).all())

    def reach(self) -> NDArray[np.float64]:
        """Largest relative distance of each query inside this segment, float64 [L]; -inf where empty."""
        used = self.key_stop > self.key_start
        result = np.full(self.total, -np.inf)
        if not used.any():
            return result
        query, key = self.query_positions, self.key_positions
        for column in range(max(query.shape[1] if query.ndim > 1 else 1, key.shape[1] if key.ndim > 1 else 1)):
            q = query[:, column] if query.ndim > 1 else query
            k = key[:, column] if key.ndim > 1 else key
            smallest = _range_minimum(k, self.key_start[used], self.key_stop[used])
            result[used] = np.maximum(result[used], q[used] - smallest)
        return result

    def _slice(self, start: int, stop: int) -> Segment:
        rows = slice(start, stop)
        root, offset = self.origin or (self, 0)
        key_start, key_stop = self.key_start[rows], self.key_stop[rows]
        if start:
            key_start, key_stop = np.maximum(key_start - start, 0), np.maximum(key_stop - start, 0)
        return Segment(
            self.name,
            key_start,
            key_stop,
            self.query_positions[rows],
            self.key_positions[rows],
            self.interpolation,
            (root, offset + start),
        )


def _range_minimum(values: Positions, start: IntArray, stop: IntArray) -> Positions:
    """Minimum of ``values[start:stop]`` for each non-empty interval, O(L log L) time and O(L) memory."""
    if bool((values[1:] >= values[:-1]).all()):
        return values[start]
    length = stop - start
    result = np.empty(len(start), dtype=values.dtype)
    level = values.copy()  # level[j] = min(values[j : j + span])
    span = 1
    while True:
        mine = (length >= span) & (length < 2 * span)
        result[mine] = np.minimum(level[start[mine]], level[stop[mine] - span])
        if not (length >= 2 * span).any():
            return result
        level[:-span] = np.minimum(level[:-span], level[span:])
        span *= 2


def _all_segments(segments: Any) -> tuple[Segment, ...]:
    """Whatever a strategy returned as its segments, as a tuple of them."""
    if not isinstance(segments, Iterable) or isinstance(segments, str | bytes | Mapping):
        raise InvalidInputError(f"segments must be a sequence of Segment, got {segments!r:.100}.")
    given = tuple(segments)
    for entry in given:
        if not isinstance(entry, Segment):
            raise InvalidInputError(f"segments must be a sequence of Segment, and one of them is {entry!r:.100}.")
    return given


def _scale_slice(scale: NDArray[np.float64] | None, rows: slice) -> NDArray[np.float64] | None:
    """Part of a scale, or None where that part is all ones: what is left may be the identity plan."""
    if scale is None or bool((scale[rows] == 1.0).all()):
        return None
    return scale[rows]


@dataclass(frozen=True, eq=False)
class PositionPlan:
    """Segments that partition the causal plane, and an optional logit scale per query.

    Parameters
    ----------
    prompt, total : int
        Lengths in tokens the plan was made for.
    segments : tuple of Segment
        Non-empty segments only; their intervals are disjoint for every query.
    query_scale : float64 [L] or None
        Multiplies the logits of query ``i``.
    window : int or None
        Pretraining window ``n`` in tokens, for reports.
    strategy : str
        Name of the strategy that made the plan.
    """

    prompt: int
    total: int
    segments: tuple[Segment, ...]
    query_scale: NDArray[np.float64] | None = None
    window: int | None = None
    strategy: str = ""
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What backends derive from the plan once and share across layers; never part of its meaning."""

    @classmethod
    def build(
        cls,
        lengths: Lengths,
        segments: Iterable[Segment],
        *,
        query_scale: NDArray[np.float64] | None = None,
        window: int | None = None,
        strategy: str = "",
    ) -> PositionPlan:
        """Drop empty segments and a scale of all ones, then make the plan.

        Raises
        ------
        InvalidInputError
            If something else than segments is given, or their arrays are of the wrong kind.
        """
        given = _all_segments(segments)
        for segment in given:
            check_segment_arrays(segment, lengths.total)
        if query_scale is not None:
            check_scale_array(query_scale, lengths.total)
        if query_scale is not None and bool((query_scale == 1.0).all()):
            query_scale = None
        kept = tuple(segment for segment in given if not segment.is_empty)
        return cls(lengths.prompt, lengths.total, kept, query_scale, window, strategy)

    @classmethod
    def identity(cls, lengths: Lengths, *, window: int | None = None, strategy: str = "") -> PositionPlan:
        """Plain RoPE: one segment ``[0, i + 1)`` with ``q = i`` and ``k = j``."""
        index = lengths.indices
        segment = Segment("all", np.zeros_like(index), index + 1, index, index)
        return cls.build(lengths, [segment], window=window, strategy=strategy)

    @cached_property
    def is_identity(self) -> bool:
        """True for plain RoPE: one segment ``[0, i + 1)``, ``q = i``, ``k = j`` and no scale."""
        if len(self.segments) != 1 or self.query_scale is not None:
            return False
        (segment,) = self.segments
        index = np.arange(self.total)
        return (
            segment.query_positions.ndim == segment.key_positions.ndim == 1
            and not segment.key_start.any()
            and all(
                np.array_equal(array, index)
                for array in (segment.key_stop - 1, segment.query_positions, segment.key_positions)
            )
        )

    @cached_property
    def keeps_distances(self) -> bool:
        """True when every attended pair is seen at its true distance and unscaled (keys may be dropped)."""
        return self.query_scale is None and all(segment.keeps_distance for segment in self.segments)

    @property
    def interpolates_logits(self) -> bool:
        """True when a segment has ``interpolation="logits"``: only some backends can run it."""
        return any(segment.interpolation == "logits" for segment in self.segments)

    def is_stock(self, window: int | None) -> bool:
        """True when a model's own attention computes this plan, clipped to its window if it has one.

        Where the window hides keys, positions may be shifted by a constant; no other key may be missing.
        """
        if window is None or window >= self.total:
            return self.is_identity
        if not self.keeps_distances:
            return False
        attended = sum(np.maximum(s.key_stop - s.key_start, 0) for s in self.segments)
        return bool((attended == np.minimum(np.arange(1, self.total + 1), window)).all())

    @cached_property
    def reach(self) -> NDArray[np.float64]:
        """Largest relative distance seen by the queries ``0 .. i``, float64 [L]."""
        reach = np.full(self.total, -np.inf)
        for segment in self.segments:
            np.maximum(reach, segment.reach(), out=reach)
        return np.maximum.accumulate(reach)

    @property
    def max_relative(self) -> float:
        """Largest relative distance ``q - k`` of any attended pair."""
        return float(self.reach[-1])

    def prefix(self, total: int) -> PositionPlan:
        """The same plan for the first ``total`` tokens (``prompt`` is unchanged). Views, not copies."""
        assert 1 <= total <= self.total
        if total == self.total:
            return self
        scale = _scale_slice(self.query_scale, slice(0, total))
        kept = tuple(s for s in (s._slice(0, total) for s in self.segments) if not s.is_empty)
        return replace(self, total=total, segments=kept, query_scale=scale, memo={})

    def suffix(self, start: int) -> PositionPlan:
        """The plan of the tokens ``start .. total - 1`` alone: keys before ``start`` are dropped."""
        assert 0 <= start < self.total
        if start == 0:
            return self
        scale = _scale_slice(self.query_scale, slice(start, None))
        kept = tuple(s for s in (s._slice(start, self.total) for s in self.segments) if not s.is_empty)
        return replace(self, total=self.total - start, segments=kept, query_scale=scale, memo={})

    def clipped(self, window: int) -> PositionPlan:
        """The plan with pairs at ``i - j >= window`` dropped (a model's own sliding window)."""
        if window >= self.total:
            return self
        floor = np.maximum(np.arange(self.total, dtype=np.int64) - (window - 1), 0)
        segments = (
            replace(
                s,
                key_start=np.maximum(s.key_start, floor),
                key_stop=np.maximum(s.key_stop, floor),
                origin=s.origin or (s, 0),
                memo={},
            )
            for s in self.segments
        )
        return replace(self, segments=tuple(s for s in segments if not s.is_empty), memo={})

    def relative_positions(self) -> NDArray[np.float64]:
        """Relative position of every pair, dense: for tests and pictures only.

        Returns
        -------
        float64 [L, L] or [L, L, F]
            ``q[i] - k[j]``; NaN where the pair is not attended.
        """
        widths = [
            array.shape[1] for s in self.segments for array in (s.query_positions, s.key_positions) if array.ndim > 1
        ]
        shape = (self.total, self.total, widths[0]) if widths else (self.total, self.total)
        relative = np.full(shape, np.nan)
        key_index = np.arange(self.total)
        for s in self.segments:
            attended = (key_index >= s.key_start[:, None]) & (key_index < s.key_stop[:, None])
            row, column = attended.nonzero()
            query, key = s.query_positions[row], s.key_positions[column]
            if widths:
                query = query if query.ndim > 1 else query[:, None]
                key = key if key.ndim > 1 else key[:, None]
            relative[row, column] = query - key
        return relative

    def check(self, *, drops_keys: bool = False) -> None:
        """Check arrays and the partition invariant in O(L): the work of the contract suite and of ``apply``.

        Raises
        ------
        InvalidInputError
            Naming the first pair that two segments attend, that none attends, or that lies in the
            future, or the segment and the array that is wrong.
        """
        for segment in self.segments:
            check_segment_arrays(segment, self.total)
        if self.query_scale is not None:
            check_scale_array(self.query_scale, self.total)
        check_values(self.segments, self.query_scale)
        check_columns(self.segments, None)
        check_partition(self.segments, self.total, drops_keys=drops_keys)

    def explain(self) -> str:
        """Text for people: segments, ranges, the d -> relative table, what lies beyond the window."""
        from posenc.explain import explain

        return explain(self)

    def _repr_html_(self) -> str:
        from posenc.notebook import plan_html

        return plan_html(self)
