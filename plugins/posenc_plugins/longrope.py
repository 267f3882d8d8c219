"""LongRoPE: Ding et al. 2024, "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", arXiv 2402.13753."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat

from posenc.errors import InvalidConfigError
from posenc.params import Capabilities
from posenc_plugins.frequencies import Factor, FrequencyParams, Positive, ScaledFrequencies

if TYPE_CHECKING:
    from posenc.rope import Rotary


class LongRoPEParams(FrequencyParams):
    """Parameters of :class:`LongRoPE`."""

    factor: Factor = Field(4.0, description="f, how many times longer the context becomes; sets the cos/sin factor")
    short_factor: tuple[PositiveFloat, ...] = Field(
        (1.0,), min_length=1, description="divisors inside the window: one, or one per frequency"
    )
    long_factor: tuple[PositiveFloat, ...] = Field(
        (4.0,), min_length=1, description="divisors beyond the window: one, or one per frequency"
    )
    attention_factor: Positive | None = Field(
        None, description="factor on cos and sin (default: sqrt(1 + ln f / ln window))"
    )


class LongRoPE(ScaledFrequencies):
    """One divisor per frequency, found by search for each model (section 3); two sets, by prompt length."""

    name = "longrope"
    summary = "LongRoPE: searched divisors per frequency, by prompt length"
    paper = "Ding et al. 2024, LongRoPE, arXiv 2402.13753"
    Params = LongRoPEParams
    capabilities = Capabilities(changes_frequencies=True, frequencies_by_length=True)

    def scaled(self, base: Rotary, prompt: int) -> Rotary:
        values = self.params.model_dump(exclude={"replace"})
        if self.window == 1 and values["attention_factor"] is None and values["factor"] > 1:
            raise InvalidConfigError(
                "longrope.window: the default attention_factor, sqrt(1 + ln f / ln window), does not exist for a "
                "window of 1 token. Give attention_factor, or a larger window."
            )
        for key in ("short_factor", "long_factor"):
            values[key] = self._per_frequency(key, len(base.inv_freq))
        return self.scaled_by_type(base, prompt, **values)

    def _per_frequency(self, key: str, count: int) -> list[float]:
        divisors = list(getattr(self.params, key))
        if len(divisors) not in (1, count):
            raise InvalidConfigError(
                f"longrope.{key}: {len(divisors)} divisors given, but the model has {count} rotary frequencies. "
                "Give one, or one for each frequency."
            )
        return divisors * count if len(divisors) == 1 else divisors
