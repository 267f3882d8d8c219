"""Dynamic NTK: emozilla 2023; written down as section 3.3 of Peng et al. 2023 (YaRN), arXiv 2309.00071."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from posenc.calibration.candidates import factor_grid
from posenc.params import Capabilities
from posenc.positions import FrequencyStrategy
from posenc_plugins.frequencies import FrequencyParams, known_window, rebased, starting_point

if TYPE_CHECKING:
    from posenc.rope import Rotary


class DynamicParams(FrequencyParams):
    """Parameters of :class:`DynamicNTK`."""

    factor: float = Field(
        1.0, ge=1, allow_inf_nan=False, description="f, the base grows by (f P / n - (f - 1))^(D / (D - 2))"
    )


class DynamicNTK(FrequencyStrategy):
    """NTK-aware scaling whose base follows the prompt; nothing changes inside the window."""

    name = "dynamic"
    summary = "NTK-aware scaling by prompt length"
    paper = "emozilla 2023, dynamic NTK, in Peng et al. 2023, arXiv 2309.00071"
    Params = DynamicParams
    capabilities = Capabilities(changes_frequencies=True, frequencies_by_length=True)

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return factor_grid(window, length)

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        factor, window = self.params.factor, known_window(self)
        growth = factor * max(prompt, window) / window - (factor - 1)
        return rebased(self, starting_point(self, base), growth)
