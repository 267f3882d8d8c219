"""Position interpolation: Chen et al. 2023, "Extending Context Window of LLMs via Positional Interpolation",
arXiv 2306.15595."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from posenc.calibration.candidates import factor_grid
from posenc.positions import FrequencyStrategy
from posenc_plugins.frequencies import FrequencyParams, starting_point

if TYPE_CHECKING:
    from posenc.rope import Rotary


class LinearParams(FrequencyParams):
    """Parameters of :class:`LinearScaling`."""

    factor: float = Field(4.0, ge=1, allow_inf_nan=False, description="f, every frequency is divided by it")


class LinearScaling(FrequencyStrategy):
    """All frequencies divided by one factor (section 2.3, equation 4)."""

    name = "linear"
    summary = "position interpolation: every frequency divided by a factor"
    paper = "Chen et al. 2023, Positional Interpolation, arXiv 2306.15595"
    Params = LinearParams

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return factor_grid(window, length)

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        own = starting_point(self, base)
        return own.with_frequencies(own.inv_freq.float() / self.params.factor, own.attention_scaling)
