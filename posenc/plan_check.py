"""What makes a plan sound: the kinds of its arrays, their values, and the partition of all pairs.

Shape letters: L = total tokens, F = rotary frequencies (rotary_dim // 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from posenc.errors import InvalidInputError

if TYPE_CHECKING:
    from posenc.plan import Segment


def check_segment_arrays(segment: Segment, total: int) -> None:
    """The arrays of a segment have the kinds and shapes that plans are made of; looks at no value.

    Raises
    ------
    InvalidInputError
        Naming the segment and the array.
    """
    from posenc.plan import Interpolation

    label = f"segment {segment.name!r}: "
    for key in ("key_start", "key_stop"):
        bound = _array(getattr(segment, key), label + key, (np.int64,))
        if bound.shape != (total,):
            raise InvalidInputError(f"{label}{key} must have shape [{total}], got {list(bound.shape)}.")
    for key in ("query_positions", "key_positions"):
        positions = _array(getattr(segment, key), label + key, (np.int64, np.float64))
        if positions.ndim not in (1, 2) or not positions.size:
            raise InvalidInputError(
                f"{label}{key} must have shape [{total}], or [{total}, F] with a column for every rotary frequency, "
                f"got {list(positions.shape)}."
            )
        if len(positions) != total:
            raise InvalidInputError(f"{label}{key} must cover {total} tokens, got {len(positions)}.")
    if segment.interpolation not in get_args(Interpolation):
        raise InvalidInputError(f"{label}interpolation must be 'positions' or 'logits', got {segment.interpolation!r}.")


def check_scale_array(query_scale: Any, total: int) -> None:
    """A scale is float64 [L]; looks at no value."""
    scale = _array(query_scale, "query_scale", (np.float64,))
    if scale.shape != (total,):
        raise InvalidInputError(f"query_scale must have shape [{total}], got {list(scale.shape)}.")


def check_values(segments: Sequence[Segment], query_scale: Any) -> None:
    """Bounds never decrease, positions are finite, and a scale is finite and positive."""
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
    """Positions with columns have one for every rotary frequency, or one that serves all of them.

    Parameters
    ----------
    segments : sequence of Segment
        All of a plan.
    frequencies : int, optional
        How many rotary frequencies the model has; without it, all positions of the plan must agree.
    """
    known, names = frequencies, "the model has" if frequencies is not None else "another segment has"
    for segment in segments:
        for key in ("query_positions", "key_positions"):
            positions = getattr(segment, key)
            columns = positions.shape[1] if positions.ndim == 2 else 1
            if columns != 1 and columns != (known := columns if known is None else known):
                raise InvalidInputError(
                    f"segment {segment.name!r}: {key} have {columns} columns, and {names} {known} rotary frequencies. "
                    "Give one column, or one for each frequency."
                )


def check_partition(segments: Sequence[Segment], total: int, *, drops_keys: bool) -> None:
    """Every pair lies in exactly one segment, in O(L); none is required to where keys may be dropped.

    Raises
    ------
    InvalidInputError
        Naming the first pair that two segments attend, that none attends, or that lies in the future.
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


def _array(value: Any, what: str, kinds: tuple[Any, ...]) -> np.ndarray[Any, Any]:
    names = " or ".join(np.dtype(kind).name for kind in kinds)
    if not isinstance(value, np.ndarray):
        raise InvalidInputError(f"{what} must be a numpy array of {names}, got a {type(value).__name__}.")
    if value.dtype not in kinds:
        raise InvalidInputError(f"{what} must be {names}, got {value.dtype}: convert it with .astype(...).")
    return value
