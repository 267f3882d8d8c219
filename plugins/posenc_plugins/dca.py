"""Dual chunk attention: An et al. 2024, "Training-Free Long-Context Scaling of LLMs", arXiv 2402.17463."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from posenc.calibration.candidates import parts
from posenc.errors import InvalidConfigError
from posenc.params import Capabilities, RemapParams
from posenc.positions import PositionStrategy
from posenc.segment import Lengths, Segment


class DualChunkParams(RemapParams):
    """Parameters of :class:`DualChunkAttention`."""

    chunk_size: PositiveInt | None = Field(None, description="C, largest position of a query (default: 3 window / 4)")
    local_size: PositiveInt | None = Field(
        None,
        description="exact distances across a chunk border; chunks hold C - local_size tokens (default: window / 8)",
    )


class DualChunkAttention(PositionStrategy):
    """Positions within chunks; query positions differ for the same, the previous and earlier chunks (section 3)."""

    name = "dca"
    summary = "dual chunk attention: positions within chunks of the sequence"
    paper = "An et al. 2024, Training-Free Long-Context Scaling of LLMs (ChunkLlama), arXiv 2402.17463"
    Params = DualChunkParams
    capabilities = Capabilities(bounded=True, monotone=False)

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        self.largest = self.tokens("chunk_size", 3 / 4)
        local = self.tokens("local_size", 1 / 8)
        self.chunk = self.largest - local
        if self.chunk < 1:
            raise InvalidConfigError(
                f"dca.local_size: {local} must be smaller than chunk_size ({self.largest}): "
                "chunks hold chunk_size - local_size tokens."
            )

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return [
            {"chunk_size": min(chunk, window - 1), "local_size": local}
            for chunk in parts(window, 1, 2, 3, 4, 5, 6, 7, 8)
            for local in parts(chunk, 1, 2, 4)
            if local < min(chunk, window - 1)
        ]

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        index, c, largest = lengths.indices, self.chunk, self.largest
        inside = index % c
        first = index - inside  # of the query's chunk
        previous = np.maximum(first - c, 0)
        successive = np.minimum(inside + c, largest)
        inter = np.full_like(index, min(2 * c - 1, largest))
        return (
            Segment("intra", first, index + 1, inside, inside),
            Segment("successive", previous, first, successive, inside),
            Segment("inter", np.zeros_like(index), previous, inter, inside),
        )
