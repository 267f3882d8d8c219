"""Position interpolation: Chen et al. 2023, "Extending Context Window of LLMs via Positional Interpolation",
arXiv 2306.15595."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from posenc.calibrate.grid import factor_grid
from posenc.positions import FrequencyStrategy, Params
from posenc_plugins.transformers_rope import transformers_rotary

if TYPE_CHECKING:
    from posenc.rope import Rotary


class LinearParams(Params):
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
        return transformers_rotary(self, base, prompt, needs_window=False, factor=self.params.factor)
