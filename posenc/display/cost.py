"""The cost of a plan, without running it: pairs per segment, and rotated copies of the keys."""

from __future__ import annotations

from dataclasses import dataclass

from posenc.display.explain import segment_pairs
from posenc.kernels.rotated import rotation_layout
from posenc.plan import PositionPlan


@dataclass(frozen=True)
class SegmentCost:
    """The work of one segment in prefill; ``share`` is its share of all causal pairs."""

    name: str
    pairs: int
    share: float


@dataclass(frozen=True)
class Cost:
    """The work of a plan.

    Parameters
    ----------
    segments : tuple of SegmentCost
        In the order of the plan.
    pairs : int
        Attended pairs in total.
    causal_pairs : int
        Pairs that plain causal attention attends.
    key_copies : int
        Rotated copies of the keys that a backend makes for the whole plan; plain attention needs one.
    copied_keys : int
        Keys in all copies together; each takes ``head_dim`` elements per key/value head.
    """

    segments: tuple[SegmentCost, ...]
    pairs: int
    causal_pairs: int
    key_copies: int
    copied_keys: int


def cost(plan: PositionPlan) -> Cost:
    """Count the work of a backend for all tokens of a plan at once, as for a prompt."""
    causal_pairs = plan.total * (plan.total + 1) // 2
    pairs = [(segment.name, segment_pairs(segment)) for segment in plan.segments]
    copies = rotation_layout(plan, plan.total).keys
    return Cost(
        segments=tuple(SegmentCost(name, count, count / causal_pairs) for name, count in pairs),
        pairs=sum(count for _, count in pairs),
        causal_pairs=causal_pairs,
        key_copies=len(copies),
        copied_keys=sum(copy.keys.stop - copy.keys.start for copy in copies),
    )
