"""Random and fixed plans to test kernels with."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from posenc.plan import PositionPlan
from posenc.segment import Interpolation, Lengths, Segment


@st.composite
def random_plans(
    draw: st.DrawFn, max_total: int = 70, frequencies: int | None = None, interpolated: bool = False
) -> PositionPlan:
    """A partition of the causal plane by random non-decreasing cuts: bands, staircases and jumps.

    Parameters
    ----------
    max_total : int
        Most tokens.
    frequencies : int, optional
        Also draw positions that differ per rotary frequency, ``[L, frequencies]``.
    interpolated : bool
        Also draw segments with ``interpolation="logits"``.
    """
    total = draw(st.integers(1, max_total))
    lengths = Lengths(draw(st.integers(1, total)), total)
    index = lengths.indices
    cuts = [np.zeros(total, dtype=np.int64)]
    for _ in range(draw(st.integers(0, 3))):
        shape = draw(st.sampled_from(["band", "chunk", "steps", "empty", "full"]))
        width = draw(st.integers(1, total))
        cut = {
            "band": np.maximum(index + 1 - width, 0),
            "chunk": index // width * width,
            "steps": np.maximum.accumulate((index * draw(st.integers(0, 7)) // 3) % (width + 1)),
            "empty": np.zeros_like(index),
            "full": index + 1,
        }[shape]
        cuts.append(np.minimum(cut, index + 1))
    bounds = [*np.sort(np.stack(cuts), axis=0), index + 1]
    maps = {
        "identity": index,
        "shifted": index + 5,
        "grouped": index // 3,
        "zero": index * 0,
        "leaky": index / 7,
    }
    if frequencies is not None:
        maps["per frequency"] = index[:, None] // (1 + np.arange(frequencies))
    kinds: list[Interpolation] = ["positions", "logits"] if interpolated else ["positions"]
    if interpolated:
        maps |= {"eighths": index / 8, "eighths, one on": index / 8 + 1, "eighths, a half on": index / 8 + 0.5}
    names, kind = st.sampled_from(sorted(maps)), st.sampled_from(kinds)
    segments = [
        Segment(f"s{number}", low, high, maps[draw(names)], maps[draw(names)], draw(kind))
        for number, (low, high) in enumerate(pairwise(bounds))
    ]
    scale = 1 + 0.2 * np.sin(index) if draw(st.booleans()) else None
    return PositionPlan.build(lengths, segments, query_scale=scale)


def banded_plan(total: int) -> PositionPlan:
    """Neighbours at their true distance, farther keys in groups of three; every kernel must be able to run it."""
    lengths = Lengths(total, total)
    index, near = lengths.indices, 7
    segments = [
        Segment.band("near", total, 0, near, index, index),
        Segment.band("far", total, near, None, index // 3 + near - near // 3, index // 3),
    ]
    return PositionPlan.build(lengths, segments)


def three_kinds_plan(total: int) -> PositionPlan:
    """Three segments, with keys at their own positions, in groups, and all at position 0 (no rotation)."""
    lengths = Lengths(total, total)
    index, near, far = lengths.indices, 7, 15
    segments = [
        Segment.band("near", total, 0, near, index, index),
        Segment.band("groups", total, near, far, index // 3 + near, index // 3),
        Segment.band("still", total, far, None, index * 0 + far, index * 0),
    ]
    return PositionPlan.build(lengths, segments)


def interpolating_plan(total: int) -> PositionPlan:
    """One segment whose logits are interpolated between whole positions."""
    lengths = Lengths(total, total)
    index = lengths.indices
    return PositionPlan.build(lengths, [Segment.band("half", total, 0, None, index, index / 2, "logits")])
