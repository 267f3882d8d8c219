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

from posenc.calibration.recommend import Pick, Range, Table, find_profile, no_calibration, read_table
from posenc.params import Capabilities, RemapParams
from posenc.plan import PositionPlan
from posenc.positions import PositionStrategy
from posenc.segment import Lengths, Segment
from posenc.trace import trace

if TYPE_CHECKING:
    from posenc.params import Fingerprint
    from posenc.rope import Rotary


@dataclass(frozen=True)
class Chosen:
    """A pick and the strategy it names."""

    pick: Pick
    strategy: PositionStrategy

    @classmethod
    def of(cls, pick: Pick, window: int | None) -> Chosen:
        """Make the strategy of a pick."""
        return cls(pick, pick.make(window))

    def made(self, made: PositionStrategy) -> Chosen:
        """The same pick with what its strategy became for a model or for one of its layers."""
        if made is self.strategy:
            return self
        described = made.describe()
        named = {"strategy": described.pop("name"), "params": described}
        return Chosen(self.pick.model_copy(update=named), made)


class AutoParams(RemapParams):
    """Parameters of :class:`Auto`."""

    calibration: str | Table | None = Field(
        None, description="calibration file, or the table made of one (default: the model's profile in posenc/profiles)"
    )

    @field_validator("calibration", mode="before")
    @classmethod
    def _accept_path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value


class Auto(PositionStrategy):
    """Delegates every prompt to the pick of its length.

    Without a file there is nothing to delegate to: planning raises InvalidConfigError, and ``apply`` looks for a
    profile of the model first. Capabilities are those that all picks of the file share.
    """

    name = "auto"
    summary = "the strategy that a calibration file found best for the prompt's length"
    paper = "no paper: measurements of posenc calibrate (2026), see docs/calibrate.md"
    Params = AutoParams
    capabilities = Capabilities(monotone=False, drops_keys=True, uses_prompt=True)

    def __init__(self, *, window: int | None = None, **params: Any) -> None:
        super().__init__(window=window, **params)
        given: str | Table | None = self.params.calibration
        self.table = read_table(given) if isinstance(given, str) else given
        self._ranges: list[tuple[int, Chosen]] = []
        self._beyond: list[Chosen] = []
        if self.table is not None:
            self._ranges = [(part.up_to, Chosen.of(part.pick, window)) for part in self.table.ranges]
            self._beyond = [Chosen.of(pick, window) for pick in self.table.beyond] or [self._ranges[-1][1]]
            made = [chosen.strategy for chosen in (*(chosen for _, chosen in self._ranges), *self._beyond)]
            self.capabilities = shared_capabilities(made)  # type: ignore[misc]

    def chosen(self, prompt: int) -> Chosen:
        """What a prompt of ``prompt`` tokens gets, and why.

        Raises
        ------
        InvalidConfigError
            Without a calibration file.
        """
        if self.table is None:
            raise no_calibration("no calibration file given, and a plan without a model has no profile")
        for up_to, chosen in self._ranges:
            if prompt <= up_to:
                return chosen
        inside = (chosen for chosen in self._beyond if self._stays_inside(chosen.strategy, prompt))
        return next(inside, self._beyond[0])

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        return self.chosen(lengths.prompt).strategy.plan(lengths.prompt, lengths.total).segments

    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        return self.chosen(lengths.prompt).strategy.plan(lengths.prompt, lengths.total).query_scale

    def plan(self, prompt: int, total: int | None = None) -> PositionPlan:
        lengths = Lengths(prompt, prompt if total is None else total)
        if prompt <= self.params.active_from:
            return super().plan(prompt, total)
        chosen = self.chosen(prompt)
        trace("auto: %d tokens -> %s: %s", prompt, chosen.pick, chosen.pick.because)
        return replace(chosen.strategy.plan(prompt, lengths.total), strategy=f"auto -> {chosen.pick}")

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        if self.table is None or prompt <= self.params.active_from:
            return base
        return self.chosen(prompt).strategy.rotary(base, prompt)

    def for_frequencies(self, count: int) -> PositionStrategy:
        return self._with(lambda chosen: chosen.made(chosen.strategy.for_frequencies(count)))

    def check_frequencies(self, base: Rotary) -> None:
        for chosen in (*(chosen for _, chosen in self._ranges), *self._beyond):  # whatever the length is one day
            chosen.strategy.check_frequencies(base)

    def for_model(self, fingerprint: Callable[[], Fingerprint]) -> PositionStrategy:
        model = fingerprint()
        if self.table is not None:
            self.table.check_model(model)
            return self
        profile = find_profile(model)
        if profile is None:
            raise no_calibration(f"no calibration file given, and posenc ships no profile of this model ({model})")
        return Auto(window=self.window, **{**self.params.model_dump(), "calibration": str(profile)})

    def for_layer(self, layer: int, layers: int) -> PositionStrategy:
        return self._with(lambda chosen: chosen.made(chosen.strategy.for_layer(layer, layers)))

    def _with(self, change: Callable[[Chosen], Chosen]) -> PositionStrategy:
        """The same table with changed picks."""
        ranges = [(up_to, change(chosen)) for up_to, chosen in self._ranges]
        beyond = [change(chosen) for chosen in self._beyond]
        if self.table is None or (ranges == self._ranges and beyond == self._beyond):
            return self
        own = copy(self)
        own._ranges, own._beyond = ranges, beyond
        own.table = (
            self.table.model_copy(  # described by its own picks: layers that describe themselves alike share plans
                update={
                    "ranges": tuple(Range(up_to=up_to, pick=chosen.pick) for up_to, chosen in ranges),
                    "beyond": tuple(chosen.pick for chosen in beyond),
                }
            )
        )
        return own

    def describe(self) -> dict[str, Any]:
        described = super().describe()
        if self.table is not None:
            described["calibration"] = self.table.model_dump(exclude_defaults=True)  # the file may not travel along
        return described

    def _stays_inside(self, chosen: PositionStrategy, prompt: int) -> bool:
        window = self.window
        return (
            window is not None
            and not chosen.capabilities.changes_frequencies
            and (chosen.plan(prompt).max_relative < window)
        )


def shared_capabilities(made: list[PositionStrategy]) -> Capabilities:
    """What all of several strategies promise, when the prompt's length decides which one is asked."""
    able = [one.capabilities for one in made]
    changes = any(own.changes_frequencies for own in able)
    described = [str(one.describe()) for one in made]
    return Capabilities(
        bounded=all(own.bounded for own in able),
        monotone=all(own.monotone for own in able),
        drops_keys=any(own.drops_keys for own in able),
        uses_prompt=True,
        changes_frequencies=changes,
        positions_per_frequency=any(own.positions_per_frequency for own in able),
        frequencies_by_length=changes and (len(set(described)) > 1 or any(own.frequencies_by_length for own in able)),
    )
