"""ReRoPE and Leaky ReRoPE: Su 2023, "Rectified Rotary Position Embeddings", github.com/bojone/rerope (no arXiv id)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from posenc.calibration.candidates import BUDGET, compressions, parts, spread
from posenc.params import Capabilities, RemapParams
from posenc.positions import PositionStrategy, log_length_scale
from posenc.segment import Lengths, Segment


class ReRoPEParams(RemapParams):
    """Parameters of :class:`ReRoPE`."""

    window_size: PositiveInt | None = Field(None, description="w, distances kept as they are (default: window / 8)")
    log_scale: bool | None = Field(
        None, description="multiply logits by max(1, ln(i + 1) / ln(window)) (default: where the window is known)"
    )


class LeakyReRoPEParams(ReRoPEParams):
    """Parameters of :class:`LeakyReRoPE`."""

    factor: float = Field(16.0, ge=1, allow_inf_nan=False, description="k, beyond the window distances grow by 1 / k")


class ReRoPE(PositionStrategy):
    """Every distance beyond the window becomes the window."""

    name = "rerope"
    summary = "exact distances inside a window, one constant distance beyond it"
    paper = "Su 2023, Rectified Rotary Position Embeddings (ReRoPE), github.com/bojone/rerope"
    Params = ReRoPEParams
    capabilities = Capabilities(bounded=True)

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        self.window_size = self.tokens("window_size", 1 / 8)
        wanted: bool | None = self.params.log_scale
        self.scale_window = window if wanted is None else self.require_window("log_scale") if wanted else None

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return [{"window_size": size} for size in spread(window / 16, 7 * window / 8, BUDGET)]

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        index = lengths.indices
        query, key = self.beyond(index)
        return (
            Segment.band("window", lengths.total, 0, self.window_size, index, index),
            Segment.band("beyond", lengths.total, self.window_size, None, query, key),
        )

    def beyond(self, index: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Query and key positions beyond the window."""
        return np.full_like(index, self.window_size), np.zeros_like(index)

    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        if self.scale_window is None:
            return None
        scale = log_length_scale(lengths, self.scale_window)
        scale[: self.window_size] = 1.0  # a prompt inside the window is left alone, whatever the window
        return scale


class LeakyReRoPE(ReRoPE):
    """Distances beyond the window keep growing, ``factor`` times slower."""

    name = "leaky_rerope"
    summary = "exact distances inside a window, distances compressed by a factor beyond it"
    paper = "Su 2023, Leaky ReRoPE, github.com/bojone/rerope"
    Params = LeakyReRoPEParams
    capabilities = Capabilities()

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        grid = []
        for near in parts(window, 1, 2, 4):
            factors = compressions(length - near, window - near, (0.75, 1, 1.5, 2, 4, 8, 16, 32))
            grid += [{"window_size": near, "factor": factor} for factor in factors]
        return grid

    def beyond(self, index: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        factor = self.params.factor
        return self.window_size + (index - self.window_size) / factor, index / factor
