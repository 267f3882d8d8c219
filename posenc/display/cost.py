"""What a plan costs before anything runs: pairs per segment, and rotated copies of the keys."""

from __future__ import annotations

from dataclasses import dataclass

from posenc.display.explain import segment_pairs
from posenc.plan import PositionPlan


@dataclass(frozen=True)
class SegmentCost:
    """Work of one segment in prefill; ``share`` is of all causal pairs."""

    name: str
    pairs: int
    share: float


@dataclass(frozen=True)
class Cost:
    """Work of a plan.

    Parameters
    ----------
    segments : tuple of SegmentCost
        In the order of the plan.
    pairs : int
        Attended pairs in total.
    causal_pairs : int
        What plain causal attention attends.
    key_copies : int
        Rotated copies of the keys that a backend makes for the whole plan; plain attention needs one.
    copied_keys : int
        Keys in all of them together; each takes the memory of one head dimension per key/value head.
    """

    segments: tuple[SegmentCost, ...]
    pairs: int
    causal_pairs: int
    key_copies: int
    copied_keys: int


def cost(plan: PositionPlan) -> Cost:
    """Count what a plan asks of a backend for all of its tokens at once (a prompt)."""
    from posenc.kernels.rotated import rotation_layout

    causal = plan.total * (plan.total + 1) // 2
    counted = [(segment.name, segment_pairs(segment)) for segment in plan.segments]
    copies = rotation_layout(plan, plan.total).keys
    return Cost(
        tuple(SegmentCost(name, pairs, pairs / causal) for name, pairs in counted),
        sum(pairs for _, pairs in counted),
        causal,
        len(copies),
        sum(copy.keys.stop - copy.keys.start for copy in copies),
    )
