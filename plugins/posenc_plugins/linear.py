"""Position interpolation: Chen et al. 2023, "Extending Context Window of LLMs via Positional Interpolation",
arXiv 2306.15595."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from posenc_plugins.frequencies import Factor, FactorScaling, FrequencyParams

if TYPE_CHECKING:
    from posenc.rope import Rotary


class LinearParams(FrequencyParams):
    """Parameters of :class:`LinearScaling`."""

    factor: Factor = Field(4.0, description="f, every frequency is divided by it")


class LinearScaling(FactorScaling):
    """All frequencies divided by one factor (section 2.3, equation 4)."""

    name = "linear"
    summary = "position interpolation: every frequency divided by a factor"
    paper = "Chen et al. 2023, Positional Interpolation, arXiv 2306.15595"
    Params = LinearParams

    def scaled(self, base: Rotary, prompt: int) -> Rotary:
        return base.with_frequencies(base.inv_freq.float() / self.params.factor, base.attention_scaling)
