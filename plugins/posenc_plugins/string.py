"""STRING: An et al. 2024, "Why Does the Effective Context Length of LLMs Fall Short?", arXiv 2410.18745."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt

from posenc.calibration.candidates import parts
from posenc.params import Capabilities, RemapParams
from posenc.positions import PositionStrategy
from posenc.segment import Lengths, Segment


class StringParams(RemapParams):
    """Parameters of :class:`ShiftedRoPE`."""

    shift: PositiveInt | None = Field(
        None, description="S, the distance from which positions shift (default: window / 3)"
    )
    window_size: NonNegativeInt = Field(128, description="w, the relative position that distance S is seen at")
    attention_factor: float = Field(
        0.1 * math.log(2) + 1, gt=0, allow_inf_nan=False, description="factor on q and on k; logits get its square"
    )


class ShiftedRoPE(PositionStrategy):
    """Large distances, rare in training, are replaced by smaller, well-trained ones (section 4, equation 4)."""

    name = "string"
    summary = "STRING: far distances shifted down onto well-trained ones"
    paper = "An et al. 2024, Why Does the Effective Context Length of LLMs Fall Short? (STRING), arXiv 2410.18745"
    Params = StringParams
    # Distance S is seen nearer than distance S - 1: the method breaks the order once.
    capabilities = Capabilities(monotone=False, uses_prompt=True)

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        self.shift = self.tokens("shift", 1 / 3)

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return [
            {"shift": shift, "window_size": seen}
            for shift in parts(window, 1, 2, 3, 4, 5, 6, 7, 8)
            for seen in parts(window, 0.25, 0.5, 1)
        ]

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        index = lengths.indices
        shifted = index - self.shift + self.params.window_size
        return (
            Segment.band("local", lengths.total, 0, self.shift, index, index),
            Segment.band("shifted", lengths.total, self.shift, None, shifted, index),
        )

    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        scale = np.full(lengths.total, self.params.attention_factor**2)
        if lengths.prompt <= self.shift:  # the prompt got the identity plan, so only later queries are scaled
            scale[: self.shift] = 1.0
        return scale
