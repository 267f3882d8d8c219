"""Llama 3.1 scaling: Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv 2407.21783."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from posenc.errors import InvalidConfigError
from posenc_plugins.frequencies import Factor, FactorScaling, FrequencyParams, Positive

if TYPE_CHECKING:
    from posenc.rope import Rotary


class Llama3Params(FrequencyParams):
    """Parameters of :class:`Llama3Scaling`."""

    factor: Factor = Field(8.0, description="f, long wavelengths are multiplied by it")
    low_freq_factor: Positive = Field(1.0, description="wavelengths above window / low_freq_factor are fully scaled")
    high_freq_factor: Positive = Field(4.0, description="wavelengths below window / high_freq_factor are kept")


class Llama3Scaling(FactorScaling):
    """Frequencies scaled by bands of wavelength."""

    name = "llama3"
    summary = "Llama 3.1: scale by wavelength bands"
    paper = "Grattafiori et al. 2024, The Llama 3 Herd of Models, arXiv 2407.21783"
    Params = Llama3Params

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        if self.params.low_freq_factor >= self.params.high_freq_factor:
            raise InvalidConfigError(
                f"llama3.low_freq_factor: {self.params.low_freq_factor:g} must be smaller than "
                f"high_freq_factor ({self.params.high_freq_factor:g})."
            )

    def scaled(self, base: Rotary, prompt: int) -> Rotary:
        from posenc.rope.types import llama3_bands

        params, window = self.params, self.known_window
        if params.factor == 1:  # mixing a frequency with itself would round it
            return base
        inv_freq = llama3_bands(
            base.inv_freq.float(),
            factor=params.factor,
            low=params.low_freq_factor,
            high=params.high_freq_factor,
            original=window,
        )
        return base.with_frequencies(inv_freq, base.attention_scaling)
