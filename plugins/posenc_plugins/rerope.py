"""ReRoPE and Leaky ReRoPE: Su 2023, "Rectified Rotary Position Embeddings", github.com/bojone/rerope (no arXiv id)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from posenc.calibration.candidates import BUDGET, near_windows, spread
from posenc.params import Capabilities
from posenc.segment import IntArray, Segment
from posenc_plugins.neighbour_window import NeighbourWindowParams, ScaledNeighbourWindow


class ReRoPEParams(NeighbourWindowParams):
    """Parameters of :class:`ReRoPE`."""

    log_scale: bool | None = Field(
        None, description="multiply logits by max(1, ln(i + 1) / ln(window)) (default: if the window is known)"
    )


class LeakyReRoPEParams(ReRoPEParams):
    """Parameters of :class:`LeakyReRoPE`."""

    factor: float = Field(16.0, ge=1, allow_inf_nan=False, description="k, beyond the window distances grow by 1 / k")


class ReRoPE(ScaledNeighbourWindow):
    """Every distance beyond the window becomes the window."""

    name = "rerope"
    summary = "exact distances inside a window, one constant distance beyond it"
    paper = "Su 2023, Rectified Rotary Position Embeddings (ReRoPE), github.com/bojone/rerope"
    Params = ReRoPEParams
    capabilities = Capabilities(bounded=True)

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return [{"window_size": size} for size in spread(window / 16, 7 * window / 8, BUDGET)]

    def beyond(self, index: IntArray) -> Segment:
        w = self.window_size
        return Segment.band("beyond", len(index), w, None, np.full_like(index, w), np.zeros_like(index))


class LeakyReRoPE(ScaledNeighbourWindow):
    """Distances beyond the window keep growing, ``factor`` times slower."""

    name = "leaky_rerope"
    summary = "exact distances inside a window, distances compressed by a factor beyond it"
    paper = "Su 2023, Leaky ReRoPE, github.com/bojone/rerope"
    Params = LeakyReRoPEParams

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return [
            {"window_size": near, "factor": factor}
            for near, factors in near_windows(window, length, (0.75, 1, 1.5, 2, 4, 8, 16, 32))
            for factor in factors
        ]

    def beyond(self, index: IntArray) -> Segment:
        w, factor = self.window_size, self.params.factor
        return Segment.band("beyond", len(index), w, None, w + (index - w) / factor, index / factor)
