"""NTK-aware scaling: bloc97 2023; written down as section 3.1 of Peng et al. 2023 (YaRN), arXiv 2309.00071."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from posenc.calibration.candidates import factor_grid
from posenc.positions import FrequencyStrategy
from posenc_plugins.frequencies import FrequencyParams, rebased, starting_point

if TYPE_CHECKING:
    from posenc.rope import Rotary


class NTKParams(FrequencyParams):
    """Parameters of :class:`NTKScaling`."""

    factor: float = Field(4.0, ge=1, allow_inf_nan=False, description="f, the lowest frequency is divided by it")


class NTKScaling(FrequencyStrategy):
    """The base of the frequencies becomes ``theta f^(D / (D - 2))`` (definition 1)."""

    name = "ntk"
    summary = "NTK-aware scaling: a larger, fixed base"
    paper = "bloc97 2023, NTK-aware scaled RoPE, in Peng et al. 2023, arXiv 2309.00071"
    Params = NTKParams

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return factor_grid(window, length)

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        return rebased(self, starting_point(self, base), self.params.factor)
