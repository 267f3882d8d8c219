"""SelfExtend: Jin et al. 2024, "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning", arXiv 2401.01325."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from posenc.calibration.candidates import compressions, parts
from posenc.params import Capabilities, RemapParams
from posenc.positions import PositionStrategy, log_length_scale
from posenc.segment import Lengths, Segment


class SelfExtendParams(RemapParams):
    """Parameters of :class:`SelfExtend`."""

    group: PositiveInt = Field(8, description="G, tokens that share one position beyond the window")
    window_size: PositiveInt | None = Field(None, description="w, distances kept as they are (default: window / 4)")
    log_scale: bool = Field(False, description="multiply logits by max(1, ln(i + 1) / ln(window))")


class SelfExtend(PositionStrategy):
    """Exact positions for neighbours, floor-divided positions beyond (section 3.2, equation 4)."""

    name = "self_extend"
    summary = "exact neighbours, grouped positions (i // G) beyond them"
    paper = "Jin et al. 2024, LLM Maybe LongLM: Self-Extend, arXiv 2401.01325"
    Params = SelfExtendParams
    capabilities = Capabilities(monotone=True)

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        self.window_size = self.tokens("window_size", 1 / 4)
        self.scale_window = self.require_window("log_scale") if self.params.log_scale else None

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        grid = []
        for near in parts(window, 1, 2, 4):
            groups = compressions(length - near, window - near, (0.75, 1, 1.25, 1.5, 2, 3, 4, 8))
            grid += [{"group": group, "window_size": near} for group in sorted({max(2, round(g)) for g in groups})]
        return grid

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        group, w = self.params.group, self.window_size
        index = lengths.indices
        grouped = index // group
        return (
            Segment.band("neighbour", lengths.total, 0, w, index, index),
            Segment.band("grouped", lengths.total, w, None, grouped + (w - w // group), grouped),
        )

    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        if self.scale_window is None:
            return None
        scale = log_length_scale(lengths, self.scale_window)
        scale[: self.window_size] = 1.0  # a prompt inside the window is left alone, whatever the window
        return scale
