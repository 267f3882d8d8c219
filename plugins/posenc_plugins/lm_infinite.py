"""LM-Infinite: Han et al. 2023, "Zero-Shot Extreme Length Generalization for LLMs", arXiv 2308.16137."""

from __future__ import annotations

import numpy as np
from pydantic import Field, NonNegativeInt

from posenc.params import Capabilities
from posenc.segment import IntArray, Segment
from posenc_plugins.neighbour_window import SinkWindow, SinkWindowParams


class LMInfiniteParams(SinkWindowParams):
    """Parameters of :class:`LMInfinite`."""

    sinks: NonNegativeInt = Field(16, description="first keys that stay attended, all at distance W")


class LMInfinite(SinkWindow):
    """A Lambda-shaped mask and a distance ceiling (section 4)."""

    name = "lm_infinite"
    summary = "nearest keys and first keys only, the first ones at a ceiling distance"
    paper = "Han et al. 2023, LM-Infinite, arXiv 2308.16137"
    Params = LMInfiniteParams
    capabilities = Capabilities(bounded=True, drops_keys=True)

    def beyond(self, index: IntArray) -> Segment:
        zeros = np.zeros_like(index)
        sink_stop = np.clip(index - (self.window_size - 1), 0, self.params.sinks)
        return Segment("sinks", zeros, sink_stop, np.full_like(index, self.window_size), zeros)
