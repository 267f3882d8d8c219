"""RoPE itself: Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864."""

from __future__ import annotations

from collections.abc import Sequence

from posenc.plan import Lengths, PositionPlan, Segment
from posenc.positions import PositionStrategy


class PlainRoPE(PositionStrategy):
    """The identity: every pair at its true distance (section 3.2.2)."""

    name = "rope"
    summary = "plain RoPE, the model as it is"
    paper = "Su et al. 2021, RoFormer, arXiv 2104.09864"

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        return PositionPlan.identity(lengths).segments
