"""The plan: at which positions each pair of a query and a key is seen.

Pure numpy, no model, no torch: this is the one data type between strategies, adapters and backends.

Shape letters: L = total tokens, F = rotary frequencies (rotary_dim // 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posenc.derived import Derivable
from posenc.errors import InvalidInputError
from posenc.segment import (
    Lengths,
    Segment,
    check_columns,
    check_segment_arrays,
    check_values,
    checked_array,
)


def _all_segments(segments: Any) -> tuple[Segment, ...]:
    """What a strategy returned as its segments, as a tuple."""
    if not isinstance(segments, Iterable) or isinstance(segments, str | bytes | Mapping):
        raise InvalidInputError(f"segments must be a sequence of Segment, got {segments!r:.100}.")
    given = tuple(segments)
    for entry in given:
        if not isinstance(entry, Segment):
            raise InvalidInputError(f"segments must be a sequence of Segment, and one of them is {entry!r:.100}.")
    return given


def _scale_slice(scale: NDArray[np.float64] | None, rows: slice) -> NDArray[np.float64] | None:
    """Part of a scale, or None where that part is all ones: the plan may be the identity then."""
    if scale is None or bool((scale[rows] == 1.0).all()):
        return None
    return scale[rows]


@dataclass(frozen=True, eq=False)
class PositionPlan(Derivable):
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

        Parameters
        ----------
        lengths : Lengths
            Prompt and total length.
        segments : iterable of Segment
            Their intervals are disjoint; :meth:`check` looks at that.
        query_scale, window, strategy
            As in the plan.

        Raises
        ------
        InvalidInputError
            If something other than segments is given, or their arrays are of the wrong kind.
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

    def is_stock(self, sliding_window: int | None) -> bool:
        """True when a model's own attention computes this plan, clipped to the layer's sliding window if it has one.

        Where the sliding window hides keys, positions may be shifted by a constant; no other key may be missing.

        Parameters
        ----------
        sliding_window : int or None
            Tokens that a query of the layer sees, itself included; None where it sees all.
        """
        if sliding_window is None or sliding_window >= self.total:
            return self.is_identity
        if not self.keeps_distances:
            return False
        attended = sum(np.maximum(s.key_stop - s.key_start, 0) for s in self.segments)
        return bool((attended == np.minimum(np.arange(1, self.total + 1), sliding_window)).all())

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
        kept = tuple(s for s in (s.sliced(0, total) for s in self.segments) if not s.is_empty)
        return replace(self, total=total, segments=kept, query_scale=scale)

    def suffix(self, start: int) -> PositionPlan:
        """The plan of the tokens ``start .. total - 1`` alone: keys before ``start`` are dropped."""
        assert 0 <= start < self.total
        if start == 0:
            return self
        scale = _scale_slice(self.query_scale, slice(start, None))
        kept = tuple(s for s in (s.sliced(start, self.total) for s in self.segments) if not s.is_empty)
        return replace(self, total=self.total - start, segments=kept, query_scale=scale)

    def clipped(self, sliding_window: int) -> PositionPlan:
        """The plan with pairs at ``i - j >= sliding_window`` dropped, as a layer's own sliding window drops them."""
        if sliding_window >= self.total:
            return self
        floor = np.maximum(np.arange(self.total, dtype=np.int64) - (sliding_window - 1), 0)
        segments = (
            replace(
                s,
                key_start=np.maximum(s.key_start, floor),
                key_stop=np.maximum(s.key_stop, floor),
                origin=s.root,
            )
            for s in self.segments
        )
        return replace(self, segments=tuple(s for s in segments if not s.is_empty))

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
        """Check arrays, values and the partition in O(L), as the contract suite and ``apply`` do.

        Parameters
        ----------
        drops_keys : bool
            Some pairs may be attended by no segment.

        Raises
        ------
        InvalidInputError
            If an array is wrong, or a pair is attended by two segments, by none, or in the future. The message
            names the segment and the array, or the first such pair.
        """
        for segment in self.segments:
            check_segment_arrays(segment, self.total)
        if self.query_scale is not None:
            check_scale_array(self.query_scale, self.total)
        check_values(self.segments, self.query_scale)
        check_columns(self.segments, None)
        check_partition(self.segments, self.total, drops_keys=drops_keys)

    def explain(self) -> str:
        """A text that shows the segments, their ranges, the d -> relative table, and what lies beyond the window."""
        text: str = _display("explain").explain(self)
        return text

    def _repr_html_(self) -> str:
        html: str = _display("notebook").plan_html(self)
        return html


def check_partition(segments: Sequence[Segment], total: int, *, drops_keys: bool) -> None:
    """Check in O(L) that every pair lies in exactly one segment, or in at most one where keys may be dropped.

    Raises
    ------
    InvalidInputError
        If a pair is attended by two segments, by none, or in the future; the message names the first such pair.
    """
    if not segments:
        raise InvalidInputError("pair (i=0, j=0) is attended by no segment.")
    names = [s.name for s in segments]
    start = np.stack([s.key_start for s in segments])
    stop = np.maximum(np.stack([s.key_stop for s in segments]), start)
    empty = stop == start
    limit = np.arange(1, total + 1)
    order = np.argsort(np.where(empty, np.iinfo(np.int64).max, start), axis=0, kind="stable")
    reached = np.zeros(total, dtype=np.int64)
    previous = np.full(total, -1)
    for rank in range(len(names)):
        which = order[rank]
        s_start, s_stop = (np.take_along_axis(a, which[None], 0)[0] for a in (start, stop))
        live = ~np.take_along_axis(empty, which[None], 0)[0]
        twice = live & (s_start < reached)
        if twice.any():
            i = int(twice.argmax())
            raise InvalidInputError(
                f"pair (i={i}, j={int(s_start[i])}) is attended by segments "
                f"{names[int(previous[i])]!r} and {names[int(which[i])]!r}."
            )
        missed = live & (s_start > reached)
        if missed.any() and not drops_keys:
            i = int(missed.argmax())
            raise InvalidInputError(f"pair (i={i}, j={int(reached[i])}) is attended by no segment.")
        reached = np.where(live, s_stop, reached)
        previous = np.where(live, which, previous)
    beyond = reached > limit
    if beyond.any():
        i = int(beyond.argmax())
        raise InvalidInputError(f"pair (i={i}, j={i + 1}) lies in the future: segments must stop at i + 1.")
    short = reached < limit
    if short.any() and not drops_keys:
        i = int(short.argmax())
        raise InvalidInputError(f"pair (i={i}, j={int(reached[i])}) is attended by no segment.")


def check_scale_array(query_scale: Any, total: int) -> None:
    """Check that a scale is float64 [L]; the values are not looked at."""
    scale = checked_array(query_scale, "query_scale", (np.float64,))
    if scale.shape != (total,):
        raise InvalidInputError(f"query_scale must have shape [{total}], got {list(scale.shape)}.")


def _display(name: str) -> Any:
    """A module of ``posenc.display``, imported when a plan is shown: the core imports no tool."""
    return import_module(f"posenc.display.{name}")
