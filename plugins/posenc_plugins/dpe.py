"""DPE: Lu et al. 2025, "Effective Length Extrapolation via Dimension-Wise Positional Embeddings Manipulation",
arXiv 2504.18857."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, PositiveInt

from posenc.errors import InvalidConfigError
from posenc.params import Capabilities, RemapParams
from posenc.positions import PositionStrategy
from posenc.segment import Lengths, Segment

if TYPE_CHECKING:
    from posenc.rope import Rotary


class DimensionWiseParams(RemapParams):
    """Parameters of :class:`DimensionWisePositions`."""

    window_size: PositiveInt | None = Field(None, description="w, distances kept as they are (default: window / 8)")
    scales: tuple[PositiveInt, ...] = Field(
        (8,), min_length=1, description="s_g, one scale for all frequencies or one for each, highest frequency first"
    )


class DimensionWisePositions(PositionStrategy):
    """Beyond the window every frequency group has its own floor-divided positions (section 3.3)."""

    name = "dpe"
    summary = "exact neighbours, positions grouped per rotary frequency beyond them"
    paper = "Lu et al. 2025, Dimension-Wise Positional Embeddings Manipulation (DPE), arXiv 2504.18857"
    Params = DimensionWiseParams

    capabilities = Capabilities(positions_per_frequency=True)

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        self.window_size = self.tokens("window_size", 1 / 8)

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        index, w = lengths.indices, self.window_size
        scales = np.array(self.params.scales, dtype=np.int64)
        grouped = index[:, None] // scales  # [L, F]
        if len(scales) == 1:  # one scale serves every frequency: plain positions [L]
            grouped, scales = grouped[:, 0], scales[0]
        return (
            Segment.band("window", lengths.total, 0, w, index, index),
            Segment.band("beyond", lengths.total, w, None, grouped + (w - w // scales), grouped),
        )

    def for_frequencies(self, count: int) -> PositionStrategy:
        given = len(self.params.scales)
        if given not in (1, count):
            raise InvalidConfigError(
                f"dpe.scales: {given} scales given, but the model has {count} rotary frequencies. "
                "Give one scale, or one for each frequency."
            )
        return self

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        self.for_frequencies(len(base.inv_freq))
        return base
