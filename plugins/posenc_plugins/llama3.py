"""Llama 3.1 scaling: Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv 2407.21783."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from posenc.calibration.candidates import factor_grid
from posenc.errors import InvalidConfigError
from posenc.positions import FrequencyStrategy
from posenc_plugins.frequencies import FrequencyParams, known_window, starting_point

if TYPE_CHECKING:
    from posenc.rope import Rotary


class Llama3Params(FrequencyParams):
    """Parameters of :class:`Llama3Scaling`."""

    factor: float = Field(8.0, ge=1, allow_inf_nan=False, description="f, long wavelengths grow by it")
    low_freq_factor: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="wavelengths beyond window / this are fully scaled"
    )
    high_freq_factor: float = Field(
        4.0, gt=0, allow_inf_nan=False, description="wavelengths below window / this are kept"
    )


class Llama3Scaling(FrequencyStrategy):
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

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return factor_grid(window, length)

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        from posenc.rope_types import llama3_bands

        own, given, window = starting_point(self, base), self.params, known_window(self)
        if given.factor == 1:  # mixing a frequency with itself would round it
            return own
        scaled = llama3_bands(
            own.inv_freq.float(),
            factor=given.factor,
            low=given.low_freq_factor,
            high=given.high_freq_factor,
            original=window,
        )
        return own.with_frequencies(scaled, own.attention_scaling)
