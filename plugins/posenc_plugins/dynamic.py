"""Dynamic NTK: emozilla 2023; written down as section 3.3 of Peng et al. 2023 (YaRN), arXiv 2309.00071."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from posenc.params import Capabilities
from posenc_plugins.frequencies import Factor, FactorScaling, FrequencyParams

if TYPE_CHECKING:
    from posenc.rope import Rotary


class DynamicParams(FrequencyParams):
    """Parameters of :class:`DynamicNTK`."""

    factor: Factor = Field(1.0, description="f, the base is multiplied by (f P / n - (f - 1))^(D / (D - 2))")


class DynamicNTK(FactorScaling):
    """NTK-aware scaling whose base follows the prompt; nothing changes inside the window."""

    name = "dynamic"
    summary = "NTK-aware scaling by prompt length"
    paper = "emozilla 2023, dynamic NTK, in Peng et al. 2023, arXiv 2309.00071"
    Params = DynamicParams
    capabilities = Capabilities(changes_frequencies=True, frequencies_by_length=True)

    def scaled(self, base: Rotary, prompt: int) -> Rotary:
        factor, window = self.params.factor, self.known_window
        return self.rebased(base, factor * max(prompt, window) / window - (factor - 1))
