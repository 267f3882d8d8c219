"""NTK-aware scaling: bloc97 2023; written down as section 3.1 of Peng et al. 2023 (YaRN), arXiv 2309.00071."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from posenc_plugins.frequencies import Factor, FactorScaling, FrequencyParams

if TYPE_CHECKING:
    from posenc.rope import Rotary


class NTKParams(FrequencyParams):
    """Parameters of :class:`NTKScaling`."""

    factor: Factor = Field(4.0, description="f, the lowest frequency is divided by it")


class NTKScaling(FactorScaling):
    """The base of the frequencies becomes ``theta f^(D / (D - 2))`` (definition 1)."""

    name = "ntk"
    summary = "NTK-aware scaling: a larger, fixed base"
    paper = "bloc97 2023, NTK-aware scaled RoPE, in Peng et al. 2023, arXiv 2309.00071"
    Params = NTKParams

    def scaled(self, base: Rotary, prompt: int) -> Rotary:
        return self.rebased(base, self.params.factor)
