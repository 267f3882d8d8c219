"""DPE: Lu et al. 2025, "Effective Length Extrapolation via Dimension-Wise Positional Embeddings Manipulation",
arXiv 2504.18857."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, PositiveInt

from posenc.errors import InvalidConfigError
from posenc.params import Capabilities
from posenc.positions import PositionStrategy
from posenc.segment import IntArray, Segment
from posenc_plugins.neighbour_window import NeighbourWindow, NeighbourWindowParams

if TYPE_CHECKING:
    from posenc.rope import Rotary


class DimensionWiseParams(NeighbourWindowParams):
    """Parameters of :class:`DimensionWisePositions`."""

    scales: tuple[PositiveInt, ...] = Field(
        (8,), min_length=1, description="s_g, one scale for all frequencies, or one for each, highest frequency first"
    )


class DimensionWisePositions(NeighbourWindow):
    """Beyond the window, positions are floor-divided by a scale per frequency group (section 3.3)."""

    name = "dpe"
    summary = "exact neighbours, positions grouped per rotary frequency beyond them"
    paper = "Lu et al. 2025, Dimension-Wise Positional Embeddings Manipulation (DPE), arXiv 2504.18857"
    Params = DimensionWiseParams
    capabilities = Capabilities(positions_per_frequency=True)

    def beyond(self, index: IntArray) -> Segment:
        w, scales = self.window_size, np.array(self.params.scales, dtype=np.int64)
        grouped = index[:, None] // scales  # [L, F]
        if len(scales) == 1:  # one scale serves every frequency: plain positions [L]
            grouped, scales = grouped[:, 0], scales[0]
        return Segment.band("beyond", len(index), w, None, grouped + (w - w // scales), grouped)

    def for_frequencies(self, count: int) -> PositionStrategy:
        scales = len(self.params.scales)
        if scales not in (1, count):
            raise InvalidConfigError(
                f"dpe.scales: {scales} scales given, but the model has {count} rotary frequencies. "
                "Give one scale, or one for each frequency."
            )
        return self

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        self.for_frequencies(len(base.inv_freq))
        return base
