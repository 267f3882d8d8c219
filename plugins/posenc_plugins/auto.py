"""Auto: the strategy that a calibration file found best for the model and the prompt's length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from posenc.calibration.recommend import (
    LengthRange,
    Pick,
    Recommendation,
    find_profile,
    no_calibration,
    read_recommendation,
)
from posenc.params import Capabilities, RemapParams
from posenc.plan import PositionPlan
from posenc.positions import PositionStrategy
from posenc.segment import Lengths, Segment
from posenc.trace import trace

if TYPE_CHECKING:
    from posenc.params import Fingerprint
    from posenc.rope import Rotary


@dataclass(frozen=True)
class PickedStrategy:
    """A pick and the strategy it names."""

    pick: Pick
    strategy: PositionStrategy

    @classmethod
    def of(cls, pick: Pick, window: int | None) -> PickedStrategy:
        """Make the strategy of a pick."""
        return cls(pick, pick.make(window))

    def using(self, strategy: PositionStrategy) -> PickedStrategy:
        """The pick with another strategy, such as that of one layer, in place of its own."""
        if strategy is self.strategy:
            return self
        params = strategy.describe()
        name = params.pop("name")
        return PickedStrategy(self.pick.model_copy(update={"strategy": name, "params": params}), strategy)


class AutoParams(RemapParams):
    """Parameters of :class:`Auto`."""

    calibration: str | Recommendation | None = Field(
        None,
        description="calibration file, or the recommendation made of one (default: the model's profile in "
        "posenc/profiles)",
    )

    @field_validator("calibration", mode="before")
    @classmethod
    def _accept_path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value


class Auto(PositionStrategy):
    """Uses, for every prompt, the strategy that was picked for its length.

    Without a calibration file, planning raises InvalidConfigError; ``apply`` first looks for a profile of the model.
    The capabilities are those that all picks of the file have in common.
    """

    name = "auto"
    summary = "the strategy that a calibration file found best for the prompt's length"
    paper = "no paper: measurements of posenc calibrate (2026), see docs/calibrate.md"
    Params = AutoParams
    capabilities = Capabilities(monotone=False, drops_keys=True, uses_prompt=True)

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        calibration: str | Recommendation | None = self.params.calibration
        self.recommendation = read_recommendation(calibration) if isinstance(calibration, str) else calibration
        self._ranges: list[tuple[int, PickedStrategy]] = []
        self._beyond: list[PickedStrategy] = []
        if self.recommendation is not None:
            ranges, beyond = self.recommendation.ranges, self.recommendation.beyond
            self._ranges = [(part.up_to, PickedStrategy.of(part.pick, window)) for part in ranges]
            self._beyond = [PickedStrategy.of(pick, window) for pick in beyond] or [self._ranges[-1][1]]
            strategies = [picked.strategy for picked in self._all_picked()]
            self.capabilities = shared_capabilities(strategies, active_from=self.active_from)  # type: ignore[misc]

    def picked(self, prompt: int) -> PickedStrategy:
        """The pick for a prompt of ``prompt`` tokens.

        Raises
        ------
        InvalidConfigError
            Without a calibration file.
        """
        if self.recommendation is None:
            raise no_calibration("no calibration file given, and a plan without a model has no profile")
        for up_to, picked in self._ranges:
            if prompt <= up_to:
                return picked
        inside = (picked for picked in self._beyond if self._stays_inside(picked.strategy, prompt))
        return next(inside, self._beyond[0])

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        return self.picked(lengths.prompt).strategy.plan(lengths.prompt, lengths.total).segments

    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        return self.picked(lengths.prompt).strategy.plan(lengths.prompt, lengths.total).query_scale

    def plan(self, prompt: int, total: int | None = None) -> PositionPlan:
        lengths = Lengths(prompt, prompt if total is None else total)
        if prompt <= self.active_from:
            return super().plan(prompt, total)
        picked = self.picked(prompt)
        trace("auto: %d tokens -> %s: %s", prompt, picked.pick, picked.pick.because)
        return replace(picked.strategy.plan(prompt, lengths.total), strategy=f"auto -> {picked.pick}")

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        if self.recommendation is None or prompt <= self.active_from:
            return base
        return self.picked(prompt).strategy.rotary(base, prompt)

    def for_frequencies(self, count: int) -> PositionStrategy:
        return self._with_strategies(lambda strategy: strategy.for_frequencies(count))

    def check_frequencies(self, base: Rotary) -> None:
        for picked in self._all_picked():  # a prompt may have any length
            picked.strategy.check_frequencies(base)

    def for_model(self, fingerprint: Callable[[], Fingerprint]) -> PositionStrategy:
        model = fingerprint()
        if self.recommendation is not None:
            self.recommendation.check_model(model)
            return self
        profile = find_profile(model)
        if profile is None:
            raise no_calibration(f"no calibration file given, and posenc ships no profile of this model ({model})")
        return Auto(window=self.window, **{**self.params.model_dump(), "calibration": str(profile)})

    def for_layer(self, layer: int, layers: int) -> PositionStrategy:
        return self._with_strategies(lambda strategy: strategy.for_layer(layer, layers))

    def _all_picked(self) -> list[PickedStrategy]:
        return [*(picked for _, picked in self._ranges), *self._beyond]

    def _with_strategies(self, change: Callable[[PositionStrategy], PositionStrategy]) -> PositionStrategy:
        """This strategy with the strategy of every pick changed; itself if nothing changes."""
        ranges = [(up_to, picked.using(change(picked.strategy))) for up_to, picked in self._ranges]
        beyond = [picked.using(change(picked.strategy)) for picked in self._beyond]
        if self.recommendation is None or (ranges == self._ranges and beyond == self._beyond):
            return self
        changed = copy(self)
        changed._ranges, changed._beyond = ranges, beyond
        changed.recommendation = self.recommendation.model_copy(  # described by its picks: equal layers share plans
            update={
                "ranges": tuple(LengthRange(up_to=up_to, pick=picked.pick) for up_to, picked in ranges),
                "beyond": tuple(picked.pick for picked in beyond),
            }
        )
        return changed

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        if self.recommendation is not None:  # by value, because the file may not be there when it is built again
            described["calibration"] = self.recommendation.model_dump(exclude_defaults=True)
        return described

    def _stays_inside(self, strategy: PositionStrategy, prompt: int) -> bool:
        return (
            self.window is not None
            and not strategy.capabilities.changes_frequencies
            and strategy.plan(prompt).max_relative < self.window
        )


def shared_capabilities(strategies: list[PositionStrategy], *, active_from: int) -> Capabilities:
    """What all of several strategies promise, if the prompt's length decides which one is used."""
    by_strategy = [strategy.capabilities for strategy in strategies]
    changes = any(able.changes_frequencies for able in by_strategy)
    described = {str(strategy.describe()) for strategy in strategies}
    varies = len(described) > 1 or active_from > 0 or any(able.frequencies_by_length for able in by_strategy)
    return Capabilities(
        bounded=all(able.bounded for able in by_strategy),
        monotone=all(able.monotone for able in by_strategy),
        drops_keys=any(able.drops_keys for able in by_strategy),
        uses_prompt=True,
        changes_frequencies=changes,
        positions_per_frequency=any(able.positions_per_frequency for able in by_strategy),
        frequencies_by_length=changes and varies,
    )
