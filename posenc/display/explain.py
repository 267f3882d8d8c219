"""Plans in words: what ``plan.explain()`` and ``posenc plan`` print."""

from __future__ import annotations

import numpy as np

from posenc.plan import PositionPlan
from posenc.segment import Segment


def sample_distances(total: int, rows: int = 12) -> list[int]:
    """Distances spread evenly on a log scale over ``0 .. total - 1``, both ends included."""
    if total <= rows:
        return list(range(total))
    spread = np.unique(np.geomspace(1, total - 1, rows - 1).round().astype(int))
    return [0, *(int(d) for d in spread)]


def relative_at(plan: PositionPlan, query: int, distance: int) -> tuple[str, float] | None:
    """Segment name and relative position of one pair; None where it is not attended.

    Positions that differ per frequency are reported by their largest value.
    """
    key = query - distance
    for segment in plan.segments:
        if segment.key_start[query] <= key < segment.key_stop[query]:
            relative = segment.query_positions[query] - segment.key_positions[key]
            return segment.name, float(np.max(relative))
    return None


def segment_pairs(segment: Segment) -> int:
    """Number of (query, key) pairs of a segment."""
    return int(np.maximum(segment.key_stop - segment.key_start, 0).sum())


def explain(plan: PositionPlan) -> str:
    """Describe a plan: segments, ranges, d -> relative table, what lies beyond the window."""
    window = "unknown window" if plan.window is None else f"window {plan.window}"
    lines = [f"{plan.strategy or 'plan'}: prompt {plan.prompt}, total {plan.total}, {window}"]
    if plan.is_identity:
        lines.append("identity: plain RoPE, every pair at its true distance")
    lines.append(f"segments (of the last query, i = {plan.total - 1}):")
    pairs = plan.total * (plan.total + 1) // 2
    for s in plan.segments:
        start, stop = int(s.key_start[-1]), int(s.key_stop[-1])
        if stop > start:
            edges = [relative_at(plan, plan.total - 1, plan.total - 1 - j) for j in (stop - 1, start)]
            shown = " .. ".join(f"{edge[1]:g}" for edge in edges if edge is not None)
            where = f"keys {start} .. {stop - 1}, relative {shown}"
        else:
            where = "no key"
        mixed = ", logits of whole positions interpolated" if s.interpolation == "logits" else ""
        lines.append(f"  {s.name:<12} {where}; {segment_pairs(s) / pairs:.1%} of all pairs{mixed}")
    dropped = 1 - sum(map(segment_pairs, plan.segments)) / pairs
    if dropped > 0:
        lines.append(f"  dropped      {dropped:.1%} of all pairs are not attended")
    lines.append("distance -> relative position (last query):")
    for distance in sample_distances(plan.total):
        found = relative_at(plan, plan.total - 1, distance)
        text = "not attended" if found is None else f"{found[1]:>10g}  {found[0]}"
        lines.append(f"  {distance:>8} -> {text}")
    if plan.query_scale is not None:
        lines.append(f"logit scale: {plan.query_scale.min():g} .. {plan.query_scale.max():g}")
    lines.append(f"largest relative position: {plan.max_relative:g}")
    if plan.window is not None:
        beyond = int((plan.reach >= plan.window).argmax()) if plan.max_relative >= plan.window else None
        lines.append(
            "inside the window everywhere"
            if beyond is None
            else f"beyond the window ({plan.window}) from query {beyond} on"
        )
    return "\n".join(lines)
