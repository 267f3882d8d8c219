"""Combine two strategies: the positions of one, the frequencies of the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from posenc.errors import InvalidConfigError
from posenc.params import Capabilities, Retention
from posenc.positions import PositionStrategy
from posenc.segment import Lengths, Segment

if TYPE_CHECKING:
    from posenc.params import Fingerprint
    from posenc.rope import Rotary


class ComposedStrategy(PositionStrategy):
    """Positions of one strategy with the frequencies of another.

    Raises
    ------
    InvalidConfigError
        If ``frequencies`` does not change frequencies, or ``positions`` does.
    """

    def __init__(self, positions: PositionStrategy, frequencies: PositionStrategy) -> None:
        if not frequencies.capabilities.changes_frequencies:
            raise InvalidConfigError(
                f"frequencies.name: {frequencies.name!r} does not change frequencies. "
                "Pass it as the strategy, and a frequency strategy (yarn, ntk, ...) here."
            )
        if positions.capabilities.changes_frequencies:
            raise InvalidConfigError(
                f"strategy: {positions.name!r} changes frequencies itself and cannot be combined with "
                f"frequencies={frequencies.name!r}. Choose one of them."
            )
        self.positions, self.frequencies = positions, frequencies
        self.window, self.params = positions.window, positions.params
        self.name = f"{positions.name}+{frequencies.name}"  # type: ignore[misc]
        self.summary = f"{positions.summary}; {frequencies.summary}"  # type: ignore[misc]
        self.paper = f"{positions.paper}; {frequencies.paper}"  # type: ignore[misc]
        p, f = positions.capabilities, frequencies.capabilities
        self.capabilities = Capabilities(  # type: ignore[misc]
            p.bounded,
            p.monotone,
            p.drops_keys,
            p.uses_prompt,
            True,
            f.frequencies_by_length,
            p.positions_per_frequency,
        )

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        return self.positions.segments(lengths)

    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        return self.positions.query_scale(lengths)

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        return self.frequencies.rotary(self.positions.rotary(base, prompt), prompt)

    def for_frequencies(self, count: int) -> PositionStrategy:
        positions, frequencies = self.positions.for_frequencies(count), self.frequencies.for_frequencies(count)
        if positions is self.positions and frequencies is self.frequencies:
            return self
        return ComposedStrategy(positions, frequencies)

    def check_frequencies(self, base: Rotary) -> None:
        self.positions.check_frequencies(base)
        self.frequencies.check_frequencies(base)

    def for_model(self, fingerprint: Callable[[], Fingerprint]) -> PositionStrategy:
        return ComposedStrategy(self.positions.for_model(fingerprint), self.frequencies.for_model(fingerprint))

    def for_layer(self, layer: int, layers: int) -> PositionStrategy:
        positions = self.positions.for_layer(layer, layers)
        frequencies = self.frequencies.for_layer(layer, layers)
        if positions is self.positions and frequencies is self.frequencies:
            return self
        return ComposedStrategy(positions, frequencies)

    @property
    def retention(self) -> Retention | None:
        return self.positions.retention

    @property
    def active_from(self) -> int:
        return self.positions.active_from

    @property
    def follows_prompt(self) -> bool:
        return self.positions.follows_prompt or self.frequencies.capabilities.frequencies_by_length

    @property
    def replan(self) -> str | int:
        return self.positions.replan

    def describe(self) -> dict[str, Any]:
        return {**self.positions.describe(), "frequencies": self.frequencies.describe()}
