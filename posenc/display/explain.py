"""Plans in words and as plain data: what ``plan.explain()`` and ``posenc plan`` print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from posenc.plan import PositionPlan
from posenc.segment import Segment


def sample_distances(total: int, rows: int = 12) -> list[int]:
    """Spread distances evenly on a log scale over ``0 .. total - 1``, both ends included."""
    if total <= rows:
        return list(range(total))
    spread = np.unique(np.geomspace(1, total - 1, rows - 1).round().astype(int))
    return [0, *(int(distance) for distance in spread)]


def relative_at(plan: PositionPlan, query: int, distance: int) -> tuple[str, float] | None:
    """Segment name and relative position of one pair; None if it is not attended.

    Positions that differ per frequency are reported by their largest value.
    """
    key = query - distance
    for segment in plan.segments:
        if segment.key_start[query] <= key < segment.key_stop[query]:
            return segment.name, _relative(segment, query, key)
    return None


def _relative(segment: Segment, query: int, key: int) -> float:
    return float(np.max(segment.query_positions[query] - segment.key_positions[key]))


@dataclass(frozen=True)
class LastKeys:
    """The keys that the last query of a plan attends in one segment.

    Parameters
    ----------
    start, stop : int
        First key, and the key after the last one.
    nearest, farthest : float
        Relative positions of the last key and of the first key.
    """

    start: int
    stop: int
    nearest: float
    farthest: float


def last_keys(segment: Segment) -> LastKeys | None:
    """Find the keys that the last query attends in a segment; None if there are none."""
    start, stop = int(segment.key_start[-1]), int(segment.key_stop[-1])
    if stop <= start:
        return None
    return LastKeys(start, stop, _relative(segment, -1, stop - 1), _relative(segment, -1, start))


def segment_pairs(segment: Segment) -> int:
    """Count the (query, key) pairs of a segment."""
    return int(np.maximum(segment.key_stop - segment.key_start, 0).sum())


def first_query_beyond(plan: PositionPlan, window: int) -> int | None:
    """Find the first query with a relative position outside the window; None if all are inside."""
    return int((plan.reach >= window).argmax()) if plan.max_relative >= window else None


def explain(plan: PositionPlan) -> str:
    """Describe a plan in words: segments, ranges, the table of distances, and where it leaves the window."""
    window = "unknown window" if plan.window is None else f"window {plan.window}"
    lines = [f"{plan.strategy or 'plan'}: prompt {plan.prompt}, total {plan.total}, {window}"]
    if plan.is_identity:
        lines.append("identity: plain RoPE, every pair at its true distance")
    lines += [*_segment_lines(plan), *_distance_lines(plan)]
    if plan.query_scale is not None:
        lines.append(f"logit scale: {plan.query_scale.min():g} .. {plan.query_scale.max():g}")
    lines.append(f"largest relative position: {plan.max_relative:g}")
    if plan.window is not None:
        query = first_query_beyond(plan, plan.window)
        beyond = f"beyond the window ({plan.window}) from query {query} on"
        lines.append("inside the window everywhere" if query is None else beyond)
    return "\n".join(lines)


def _segment_lines(plan: PositionPlan) -> list[str]:
    lines = [f"segments (of the last query, i = {plan.total - 1}):"]
    causal_pairs = plan.total * (plan.total + 1) // 2
    attended = 0
    for segment in plan.segments:
        keys = last_keys(segment)
        where = "no key"
        if keys is not None:
            where = f"keys {keys.start} .. {keys.stop - 1}, relative {keys.nearest:g} .. {keys.farthest:g}"
        interpolated = ", logits of whole positions interpolated" if segment.interpolation == "logits" else ""
        pairs = segment_pairs(segment)
        attended += pairs
        lines.append(f"  {segment.name:<12} {where}; {pairs / causal_pairs:.1%} of all pairs{interpolated}")
    dropped = 1 - attended / causal_pairs
    if dropped > 0:
        lines.append(f"  dropped      {dropped:.1%} of all pairs are not attended")
    return lines


def _distance_lines(plan: PositionPlan) -> list[str]:
    lines = ["distance -> relative position (last query):"]
    for distance in sample_distances(plan.total):
        pair = relative_at(plan, plan.total - 1, distance)
        text = "not attended" if pair is None else f"{pair[1]:>10g}  {pair[0]}"
        lines.append(f"  {distance:>8} -> {text}")
    return lines


def describe(plan: PositionPlan) -> dict[str, Any]:
    """Describe a plan as plain data: lengths, segments of the last query, the table of distances."""
    scale = plan.query_scale
    return {
        "strategy": plan.strategy,
        "prompt": plan.prompt,
        "total": plan.total,
        "window": plan.window,
        "is_identity": plan.is_identity,
        "max_relative": plan.max_relative,
        "query_scale": None if scale is None else [float(scale.min()), float(scale.max())],
        "segments": [_describe_segment(segment) for segment in plan.segments],
        "distances": [_describe_distance(plan, distance) for distance in sample_distances(plan.total)],
    }


def _describe_segment(segment: Segment) -> dict[str, Any]:
    keys = last_keys(segment)
    return {
        "name": segment.name,
        "pairs": segment_pairs(segment),
        "interpolation": segment.interpolation,
        "last_query_keys": None if keys is None else [keys.start, keys.stop],
        "last_query_relative": None if keys is None else [keys.nearest, keys.farthest],
    }


def _describe_distance(plan: PositionPlan, distance: int) -> dict[str, Any]:
    segment, relative = relative_at(plan, plan.total - 1, distance) or (None, None)
    return {"distance": distance, "relative": relative, "segment": segment}
