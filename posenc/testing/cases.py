"""Cases of the strategy contract: strategies, windows and lengths, drawn by hypothesis."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import hypothesis
from hypothesis import strategies as st

from posenc.errors import PosencError
from posenc.plan import PositionPlan
from posenc.planning.composed import ComposedStrategy
from posenc.positions import PositionStrategy
from posenc.testing.violation import violated

Factory = PositionStrategy | Callable[..., PositionStrategy]


@dataclass(frozen=True)
class PlanCase:
    """A strategy and lengths to plan, ``prompt <= shorter <= total``."""

    strategy: PositionStrategy
    prompt: int
    total: int
    shorter: int

    def plan(self, prompt: int | None = None, total: int | None = None) -> PositionPlan:
        """The plan for the lengths of the case, or for others."""
        prompt = self.prompt if prompt is None else prompt
        return planned(self.strategy, prompt, self.total if total is None else total)

    @property
    def where(self) -> str:
        """What was planned; every message begins with it."""
        return label(self.strategy, self.prompt, self.total)


@dataclass(frozen=True)
class LengthLimits:
    """Bounds of the drawn windows and lengths, in tokens."""

    windows: tuple[int, int]
    max_prompt: int
    max_new: int


def label(strategy: PositionStrategy, prompt: int, total: int) -> str:
    """The name of a plan in messages."""
    return f"{strategy!r}.plan({prompt}, {total}): "


def planned(strategy: PositionStrategy, prompt: int, total: int) -> PositionPlan:
    """The plan; an error while planning is a violation."""
    try:
        plan = strategy.plan(prompt, total)
    except PosencError as error:
        violated(f"{label(strategy, prompt, total)}raises {type(error).__name__}: {error}")
    if (plan.prompt, plan.total) != (prompt, total):
        violated(f"{label(strategy, prompt, total)}the plan is for prompt {plan.prompt} and total {plan.total}.")
    return plan


def make_strategy(factory: Factory, window: int | None, params: Mapping[str, Any]) -> PositionStrategy:
    """Make a new strategy: call a factory, or build an instance again from ``describe()``."""
    if isinstance(factory, PositionStrategy):
        return rebuilt(factory, **params)
    return factory(window=window, **params)


def rebuilt(strategy: PositionStrategy, **changes: Any) -> PositionStrategy:
    """The strategy built again from ``describe()`` after a round trip through JSON, with some parameters changed."""
    if isinstance(strategy, ComposedStrategy):
        return ComposedStrategy(rebuilt(strategy.positions, **changes), rebuilt(strategy.frequencies))
    try:
        described = json.loads(json.dumps(strategy.describe()))
    except (TypeError, ValueError) as error:
        violated(f"{strategy!r}.describe() is not plain data that a file can hold: {error}.")
    if described.pop("name", None) != strategy.name:
        violated(f"{strategy!r}.describe() does not say 'name': {strategy.name!r}.")
    return type(strategy)(window=strategy.window, **{**described, **changes})


def for_every_case(
    check: Callable[[PlanCase], None],
    factory: Factory,
    params: Mapping[str, Any],
    lengths: LengthLimits,
    settings: hypothesis.settings,
) -> None:
    """Run a check on drawn windows and lengths; hypothesis shrinks a failure to the smallest ones."""
    fixed = factory.window if isinstance(factory, PositionStrategy) else None
    windows = st.just(fixed) if isinstance(factory, PositionStrategy) else st.integers(*lengths.windows)

    @settings
    @hypothesis.given(
        window=windows,
        prompt=st.integers(1, lengths.max_prompt),
        new=st.integers(0, lengths.max_new),
        decoded=st.integers(0, lengths.max_new),
    )
    def example(window: int | None, prompt: int, new: int, decoded: int) -> None:
        total = prompt + new
        check(PlanCase(make_strategy(factory, window, params), prompt, total, min(prompt + decoded, total)))

    example()
