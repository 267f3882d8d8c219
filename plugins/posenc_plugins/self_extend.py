"""SelfExtend: Jin et al. 2024, "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning", arXiv 2401.01325."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field, PositiveInt

from posenc.calibration.candidates import near_windows
from posenc.segment import IntArray, Segment
from posenc_plugins.neighbour_window import NeighbourWindowParams, ScaledNeighbourWindow


class SelfExtendParams(NeighbourWindowParams):
    """Parameters of :class:`SelfExtend`."""

    window_size: PositiveInt | None = Field(None, description="w, distances kept as they are (default: window / 4)")
    group: PositiveInt = Field(8, description="G, tokens that share one position beyond the window")
    log_scale: bool = Field(False, description="multiply logits by max(1, ln(i + 1) / ln(window))")


class SelfExtend(ScaledNeighbourWindow):
    """Exact positions for neighbours, floor-divided positions beyond (section 3.2, equation 4)."""

    name = "self_extend"
    summary = "exact neighbours, grouped positions (i // G) beyond them"
    paper = "Jin et al. 2024, LLM Maybe LongLM: Self-Extend, arXiv 2401.01325"
    Params = SelfExtendParams
    default_share = 1 / 4
    near_name = "neighbour"

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return [
            {"group": group, "window_size": near}
            for near, factors in near_windows(window, length, (0.75, 1, 1.25, 1.5, 2, 3, 4, 8))
            for group in sorted({max(2, round(factor)) for factor in factors})
        ]

    def beyond(self, index: IntArray) -> Segment:
        w, group = self.window_size, self.params.group
        grouped = index // group
        return Segment.band("grouped", len(index), w, None, grouped + (w - w // group), grouped)
