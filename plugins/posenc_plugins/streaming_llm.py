"""StreamingLLM: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453."""

from __future__ import annotations

import numpy as np

from posenc.params import Capabilities
from posenc.segment import IntArray, Segment
from posenc_plugins.neighbour_window import SinkWindow


class StreamingLLM(SinkWindow):
    """Positions inside the rolling cache of ``s`` sinks and ``W`` recent keys, not in the text (section 3.2).

    Inside the cache recent keys keep their true distance, and a full cache puts its query at
    position ``s + W - 1`` while sink ``j`` stays at ``j``.
    """

    name = "streaming_llm"
    summary = "attention sinks and recent keys only, positions inside the kept cache"
    paper = "Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453"
    capabilities = Capabilities(bounded=True, drops_keys=True)

    @property
    def capacity(self) -> int:
        """Tokens that the cache holds; until it is full nothing is dropped."""
        sinks: int = self.params.sinks
        return sinks + self.window_size

    def near(self, index: IntArray) -> Segment:
        start = np.where(index >= self.capacity, index - (self.window_size - 1), 0)
        return Segment("window", start, index + 1, index, index)

    def beyond(self, index: IntArray) -> Segment:
        stop = np.where(index >= self.capacity, self.params.sinks, 0)
        return Segment("sinks", np.zeros_like(index), stop, np.full_like(index, self.capacity - 1), index)
