"""YaRN: Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models", arXiv 2309.00071."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from posenc.calibration.candidates import factor_grid
from posenc.errors import InvalidConfigError
from posenc.positions import FrequencyStrategy
from posenc_plugins.frequencies import FrequencyParams, known_window, scaled_by_type, starting_point

if TYPE_CHECKING:
    from posenc.rope import Rotary


class YaRNParams(FrequencyParams):
    """Parameters of :class:`YaRN`."""

    factor: float = Field(4.0, ge=1, allow_inf_nan=False, description="f, the context grows by it")
    beta_fast: float = Field(32.0, gt=0, allow_inf_nan=False, description="turns in the window kept as they are")
    beta_slow: float = Field(1.0, gt=0, allow_inf_nan=False, description="turns in the window fully interpolated")
    attention_factor: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="factor on cos and sin (default: 0.1 ln f + 1)"
    )


class YaRN(FrequencyStrategy):
    """Low frequencies are interpolated, high ones kept, with a ramp between (section 3.2, definitions 2 and 3)."""

    name = "yarn"
    summary = "YaRN: interpolate low frequencies, keep high ones, scale attention"
    paper = "Peng et al. 2023, YaRN, arXiv 2309.00071"
    Params = YaRNParams

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        if self.params.beta_slow > self.params.beta_fast:
            raise InvalidConfigError(
                f"yarn.beta_slow: {self.params.beta_slow:g} must not exceed beta_fast ({self.params.beta_fast:g})."
            )

    @classmethod
    def calibration_grid(cls, window: int, length: int) -> Sequence[dict[str, Any]]:
        return factor_grid(window, length)

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        own, given = starting_point(self, base), self.params
        known_window(self)
        if given.factor == 1:  # the ramp between a frequency and itself would round it
            return own.with_frequencies(own.inv_freq, own.attention_scaling * (given.attention_factor or 1.0))
        return scaled_by_type(self, own, prompt, **given.model_dump(exclude={"replace"}))
