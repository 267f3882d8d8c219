"""LM-Infinite: Han et al. 2023, "Zero-Shot Extreme Length Generalization for LLMs", arXiv 2308.16137."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from posenc.calibration.candidates import parts
from posenc.params import Capabilities, RemapParams, Retention
from posenc.positions import PositionStrategy
from posenc.segment import Lengths, Segment


class LMInfiniteParams(RemapParams):
    """Parameters of :class:`LMInfinite`."""

    window_size: PositiveInt | None = Field(None, description="W, nearest keys that are attended (default: window / 2)")
    sinks: NonNegativeInt = Field(16, description="first keys that stay attended, all at distance W")


class LMInfinite(PositionStrategy):
    """A Lambda-shaped mask and a distance ceiling (section 4)."""

    name = "lm_infinite"
    summary = "nearest keys and first keys only, the first ones at a ceiling distance"
    paper = "Han et al. 2023, LM-Infinite, arXiv 2308.16137"
    Params = LMInfiniteParams
    capabilities = Capabilities(bounded=True, drops_keys=True)

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        self.window_size = self.tokens("window_size", 1 / 2)

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        sizes = parts(window, 1, 2, 3, 4, 5, 6, 7, 8)
        return [{"window_size": size, "sinks": sinks} for size in sizes for sinks in (0, 4, 16)]

    @property
    def retention(self) -> Retention:
        return Retention(self.params.sinks, self.window_size)

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        index, reach = lengths.indices, self.window_size
        zeros = np.zeros_like(index)
        sink_stop = np.clip(index - (reach - 1), 0, self.params.sinks)
        return (
            Segment.band("window", lengths.total, 0, reach, index, index),
            Segment("sinks", zeros, sink_stop, np.full_like(index, reach), zeros),
        )
