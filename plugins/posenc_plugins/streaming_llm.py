"""StreamingLLM: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from posenc.calibration.candidates import parts
from posenc.params import Capabilities, RemapParams, Retention
from posenc.positions import PositionStrategy
from posenc.segment import Lengths, Segment


class StreamingLLMParams(RemapParams):
    """Parameters of :class:`StreamingLLM`."""

    window_size: PositiveInt | None = Field(None, description="W, nearest keys that are kept (default: window / 2)")
    sinks: NonNegativeInt = Field(4, description="s, first keys that are kept")


class StreamingLLM(PositionStrategy):
    """Positions inside the rolling cache of ``s`` sinks and ``W`` recent keys, not in the text (section 3.2).

    Inside the cache recent keys keep their true distance, and a full cache puts its query at
    position ``s + W - 1`` while sink ``j`` stays at ``j``.
    """

    name = "streaming_llm"
    summary = "attention sinks and recent keys only, positions inside the kept cache"
    paper = "Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"
    Params = StreamingLLMParams
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
        index, reach, sinks = lengths.indices, self.window_size, self.params.sinks
        full = index >= sinks + reach  # until the cache is full nothing is dropped
        zeros = np.zeros_like(index)
        return (
            Segment("window", np.where(full, index - (reach - 1), 0), index + 1, index, index),
            Segment("sinks", zeros, np.where(full, sinks, 0), np.full_like(index, sinks + reach - 1), index),
        )
