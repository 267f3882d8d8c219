"""Segments of the causal plane: the pairs of queries and keys that share one position map.

Pure numpy. Shape letters: L = total tokens, F = rotary frequencies (rotary_dim // 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from posenc.derived import Derivable
from posenc.errors import InvalidInputError

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
class Segment(Derivable):
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
    """The segment that this one is a slice of, and where the slice starts; None for no slice. See :attr:`root`."""

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
        """The pairs of ``total`` tokens at a distance ``nearest <= i - j < farthest``.

        Parameters
        ----------
        nearest, farthest : int
            Distances in tokens; without a ``farthest``, the band reaches back to the first key.
        query, key : int64 or float64, [total] or [total, F]
            Rotary positions.
        """
        # In place: at a million tokens, touching fresh memory costs more than the arithmetic.
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
    def root(self) -> tuple[Segment, int]:
        """The longest segment that this one is a slice of, or itself, and the token at which the slice starts.

        What is derived from the root's positions serves all of its slices, so cos/sin tables are kept there.
        """
        return self.origin or (self, 0)

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
            return False  # two interpolated fractions are not seen at their difference
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

    def sliced(self, start: int, stop: int) -> Segment:
        """The segment of the tokens ``start .. stop - 1`` alone. Views where nothing moves, not copies."""
        rows = slice(start, stop)
        root, offset = self.root
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


def check_segment_arrays(segment: Segment, total: int) -> None:
    """Check the kinds and shapes of a segment's arrays; the values are not looked at.

    Raises
    ------
    InvalidInputError
        If one is wrong; the message names the segment and the array.
    """
    label = f"segment {segment.name!r}: "
    for key in ("key_start", "key_stop"):
        bound = checked_array(getattr(segment, key), label + key, (np.int64,))
        if bound.shape != (total,):
            raise InvalidInputError(f"{label}{key} must have shape [{total}], got {list(bound.shape)}.")
    for key in ("query_positions", "key_positions"):
        positions = checked_array(getattr(segment, key), label + key, (np.int64, np.float64))
        if positions.ndim not in (1, 2) or not positions.size:
            raise InvalidInputError(
                f"{label}{key} must have shape [{total}], or [{total}, F] with a column for every rotary frequency, "
                f"got {list(positions.shape)}."
            )
        if len(positions) != total:
            raise InvalidInputError(f"{label}{key} must cover {total} tokens, got {len(positions)}.")
    if segment.interpolation not in get_args(Interpolation):
        raise InvalidInputError(f"{label}interpolation must be 'positions' or 'logits', got {segment.interpolation!r}.")


def check_values(segments: Sequence[Segment], query_scale: Any) -> None:
    """Check that bounds never decrease, positions are finite, and a scale is finite and positive."""
    for segment in segments:
        label = f"segment {segment.name!r}: "
        for key in ("key_start", "key_stop"):
            if (np.diff(getattr(segment, key)) < 0).any():
                raise InvalidInputError(f"{label}{key} decreases somewhere.")
        if segment.key_start[0] < 0:
            raise InvalidInputError(f"{label}key_start is negative.")
        for key in ("query_positions", "key_positions"):
            if not np.isfinite(getattr(segment, key)).all():
                raise InvalidInputError(f"{label}{key} hold a NaN or an infinity.")
    if query_scale is not None:
        wrong = ~(np.isfinite(query_scale) & (query_scale > 0))
        if wrong.any():
            i = int(wrong.argmax())
            raise InvalidInputError(f"query_scale is {query_scale[i]} at query {i}: it must be finite and positive.")


def check_columns(segments: Sequence[Segment], frequencies: int | None) -> None:
    """Check that positions with columns have one for every rotary frequency, or one that serves all.

    Parameters
    ----------
    segments : sequence of Segment
        All segments of a plan.
    frequencies : int, optional
        How many rotary frequencies the model has; without it, all positions of the plan must agree.
    """
    expected, owner = frequencies, "the model has" if frequencies is not None else "another segment has"
    for segment in segments:
        for key in ("query_positions", "key_positions"):
            positions = getattr(segment, key)
            columns = positions.shape[1] if positions.ndim == 2 else 1
            if columns == 1:
                continue
            expected = columns if expected is None else expected
            if columns != expected:
                raise InvalidInputError(
                    f"segment {segment.name!r}: {key} have {columns} columns, and {owner} {expected} rotary "
                    "frequencies. Give one column, or one for each frequency."
                )


def checked_array(value: Any, what: str, kinds: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    """The value, if it is a numpy array of one of some dtypes; ``what`` names it in the message otherwise."""
    names = " or ".join(np.dtype(kind).name for kind in kinds)
    if not isinstance(value, np.ndarray):
        raise InvalidInputError(f"{what} must be a numpy array of {names}, got a {type(value).__name__}.")
    if value.dtype not in kinds:
        raise InvalidInputError(f"{what} must be {names}, got {value.dtype}: convert it with .astype(...).")
    return value
