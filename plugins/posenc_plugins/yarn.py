"""YaRN: Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models", arXiv 2309.00071."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from posenc.errors import InvalidConfigError
from posenc_plugins.frequencies import Factor, FactorScaling, FrequencyParams, Positive

if TYPE_CHECKING:
    from posenc.rope import Rotary


class YaRNParams(FrequencyParams):
    """Parameters of :class:`YaRN`."""

    factor: Factor = Field(4.0, description="f, how many times longer the context becomes")
    beta_fast: Positive = Field(32.0, description="frequencies with more turns in the window are kept")
    beta_slow: Positive = Field(1.0, description="frequencies with fewer turns in the window are fully interpolated")
    attention_factor: Positive | None = Field(None, description="factor on cos and sin (default: 0.1 ln f + 1)")


class YaRN(FactorScaling):
    """Low frequencies are interpolated, high ones kept, with a ramp between them (section 3.2, definitions 2 and 3)."""

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

    def scaled(self, base: Rotary, prompt: int) -> Rotary:
        params = self.params
        if params.factor == 1:  # the ramp between a frequency and itself would round it
            return base.with_frequencies(base.inv_freq, base.attention_scaling * (params.attention_factor or 1.0))
        return self.scaled_by_type(base, prompt, **params.model_dump(exclude={"replace"}))
