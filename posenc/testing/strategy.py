"""The contract of a strategy, as a class for pytest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import hypothesis
import numpy as np
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st

from posenc.errors import InvalidConfigError, PluginError
from posenc.params import RemapParams
from posenc.planning.composed import ComposedStrategy
from posenc.plugins import strategy_info
from posenc.positions import FrequencyStrategy, PositionStrategy
from posenc.testing import invariants
from posenc.testing.cases import Factory, LengthLimits, PlanCase, for_every_case, label, make_strategy, planned, rebuilt
from posenc.testing.dense import DensePlan
from posenc.testing.frequencies import check_rotary
from posenc.testing.violation import violated

NO_SUCH_KEY = "no_such_parameter"
LAYERS = 3
FREQUENCIES = (4, 16, 32)
"""Numbers of rotary frequencies that a strategy is tested with."""


class StrategyContract:
    """Inherit from this in a test module and set :attr:`strategy`; every check is one test.

    Examples
    --------
    >>> class TestHalved(posenc.testing.StrategyContract):
    ...     strategy = Halved
    ...     params = ({}, {"near": 1}, {"near": 30})
    """

    strategy: ClassVar[Factory]
    """A strategy class, or a function ``f(window=..., **params)`` that returns a strategy; it is called with many
    windows. Or one strategy object, which is tested with its own window and parameters."""

    params: ClassVar[Sequence[Mapping[str, Any]]] = ({},)
    """Parameters to test, in turn. Choose them so small that :attr:`max_prompt` tokens reach every segment."""

    windows: ClassVar[tuple[int, int]] = (16, 96)
    """Smallest and largest pretraining window."""

    max_prompt: ClassVar[int] = 150
    """Longest prompt in tokens. Checks look at every pair, so their time grows with its square."""

    max_new: ClassVar[int] = 40
    """Most tokens generated after the prompt."""

    settings: ClassVar[hypothesis.settings] = hypothesis.settings(
        max_examples=25,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow],
    )
    """Settings of hypothesis, such as how many cases each check draws."""

    def test_it_can_be_registered(self) -> None:
        """Name, summary, paper, parameters and capabilities allow the strategy to be registered."""
        for _, strategy in self._strategies():
            if isinstance(strategy, ComposedStrategy):
                continue
            try:
                strategy_info(type(strategy), "the distribution under test")
            except PluginError as error:
                violated(str(error))
            if not (strategy.capabilities.changes_frequencies or isinstance(strategy.params, RemapParams)):
                violated(f"{strategy!r}: Params of a strategy that moves positions must inherit posenc.RemapParams.")

    def test_unknown_parameters_are_refused(self) -> None:
        """A misspelt parameter raises InvalidConfigError and names its key path."""
        for _, strategy in self._strategies():
            if isinstance(strategy, ComposedStrategy):
                continue
            try:
                rebuilt(strategy, **{NO_SUCH_KEY: 1})
            except InvalidConfigError as error:
                if NO_SUCH_KEY not in str(error):
                    violated(f"{strategy!r}: the error for an unknown parameter does not name it: {error}")
            except Exception as error:
                violated(f"{strategy!r}: an unknown parameter raises {type(error).__name__}, not InvalidConfigError.")
            else:
                violated(f"{strategy!r}: an unknown parameter is accepted; a misspelt one would be ignored.")

    def test_describe_builds_it_again(self) -> None:
        """``describe()`` is plain data from which an equal strategy can be built."""

        def check(case: PlanCase) -> None:
            try:
                again = rebuilt(case.strategy)
            except InvalidConfigError as error:
                violated(f"{case.strategy!r}.describe() does not build it again: {error}")
            if again.describe() != case.strategy.describe() or again.params != case.strategy.params:
                violated(f"{case.strategy!r}.describe() builds {again!r}.")
            other = planned(again, case.prompt, case.total)
            names = ("as made", "as built again from describe()")
            invariants.check_same(case.plan(), other, case.where, what="describe() loses something", names=names)

        self._for_every_case(check)

    def test_partition(self) -> None:
        """Every pair lies in exactly one segment (or in none, with ``drops_keys``); bounds and positions are valid."""
        self._for_every_case(
            lambda case: invariants.check_partition(
                case.plan(), case.where, drops_keys=case.strategy.capabilities.drops_keys
            )
        )

    def test_order(self) -> None:
        """No relative distance is negative; with ``monotone``, no farther key has a smaller one."""
        self._for_every_case(
            lambda case: invariants.check_order(case.plan(), case.where, monotone=case.strategy.capabilities.monotone)
        )

    def test_range(self) -> None:
        """The plan reports the largest relative distance of all attended pairs."""
        self._for_every_case(lambda case: invariants.check_range(case.plan(), case.where))

    def test_bounded(self) -> None:
        """With ``bounded`` and default parameters, prompts up to ``window ** 2 / 8`` stay inside the window."""
        factory = self._factory
        defaults = [
            params for params, strategy in self._strategies() if strategy.describe().keys() <= {"name", "frequencies"}
        ]
        windows = st.integers(max(16, self.windows[0]), max(16, self.windows[1]))
        if isinstance(factory, PositionStrategy):
            defaults = defaults if (factory.window or 0) >= 16 else []
            windows = st.just(factory.window or 0)
        bounded = [params for params in defaults if make_strategy(factory, 64, params).capabilities.bounded]
        if not bounded:
            pytest.skip("bounded is not declared, or not tested with default parameters and a window")

        @self.settings
        @hypothesis.given(window=windows, share=st.floats(0, 1))
        def example(window: int, share: float) -> None:
            strategy, prompt = make_strategy(factory, window, bounded[0]), max(1, round(share * window**2 / 8))
            plan = planned(strategy, prompt, prompt)
            invariants.check_bounded(plan, label(strategy, prompt, prompt), window=window)

        example()

    def test_prefill_equals_decode(self) -> None:
        """Plans of the prompt, and of a few more tokens, are the beginning of the plan of all tokens and its scale."""

        def check(case: PlanCase) -> None:
            full = case.plan()
            for total in sorted({case.prompt, case.shorter, case.total - 1} - {case.prompt - 1}):
                invariants.check_prefill_equals_decode(full, case.plan(total=total), case.where)

        self._for_every_case(check)

    def test_uses_prompt(self) -> None:
        """Without ``uses_prompt``, the plan depends on ``total`` alone."""
        names = ("when some tokens were generated", "when all are the prompt")

        def check(case: PlanCase) -> None:
            idle = case.prompt <= case.strategy.active_from
            if not (case.strategy.capabilities.uses_prompt or idle):
                what = "Capabilities(uses_prompt=True) is not declared, but the plan depends on the prompt"
                invariants.check_same(case.plan(), case.plan(case.total), case.where, what=what, names=names)

        self._for_every_case(check)

    def test_retention(self) -> None:
        """With ``retention``, all other keys are never attended again, and the kept ones are seen as before."""

        def check(case: PlanCase) -> None:
            kept = case.strategy.retention
            idle = case.prompt <= case.strategy.active_from
            if kept is None or idle:
                return
            if kept.first < 0 or kept.last < 1:
                violated(f"{case.strategy!r}: retention needs first >= 0 and last >= 1, got {kept}.")
            if case.strategy.capabilities.uses_prompt:
                violated(f"{case.strategy!r}: retention cannot be combined with Capabilities(uses_prompt=True).")
            invariants.check_retention(case.plan(), case.where, first=kept.first, last=kept.last)

        self._for_every_case(check)

    def test_identity(self) -> None:
        """A plan that moves no pair has no scale, and if it is one segment, it is recognised as the identity."""

        def check(case: PlanCase) -> None:
            plan = case.plan()
            if not invariants.keeps_every_distance(plan, case.where):
                return
            because = "every pair keeps its true distance"
            invariants.check_unscaled(plan, case.where, because=because)
            if len(plan.segments) == 1:
                invariants.check_identity(plan, case.where, because=because)

        self._for_every_case(check)

    def test_active_from(self) -> None:
        """Prompts up to ``active_from`` get the identity plan, longer ones the usual plan."""
        names = ("with active_from", "without")

        def check(case: PlanCase) -> None:
            if not isinstance(case.strategy.params, RemapParams):
                return
            idle, usual = rebuilt(case.strategy, active_from=case.prompt), rebuilt(case.strategy, active_from=0)
            because = f"active_from is {case.prompt}"
            where = label(idle, case.prompt, case.total)
            invariants.check_identity(planned(idle, case.prompt, case.total), where, because=because)
            longer = case.prompt + 1, case.total + 1
            invariants.check_same(
                planned(idle, *longer),
                planned(usual, *longer),
                label(idle, *longer),
                what="active_from changes a longer prompt",
                names=names,
            )

        self._for_every_case(check)

    def test_layers(self) -> None:
        """Strategies from ``for_layer`` keep the partition, decode as they prefill, and respect ``active_from``."""

        def check(case: PlanCase) -> None:
            for layer, strategy in enumerate(layer_strategies(case.strategy)):
                if strategy is case.strategy:
                    continue
                where, full = f"{case.where}layer {layer} of {LAYERS}: ", planned(strategy, case.prompt, case.total)
                invariants.check_partition(full, where, drops_keys=strategy.capabilities.drops_keys)
                invariants.check_prefill_equals_decode(full, planned(strategy, case.prompt, case.shorter), where)
                if isinstance(case.strategy.params, RemapParams):
                    idle = layer_strategies(rebuilt(case.strategy, active_from=case.prompt))[layer]
                    because = f"active_from is {case.prompt}"
                    invariants.check_identity(planned(idle, case.prompt, case.total), where, because=because)

        self._for_every_case(check)

    def test_plans_do_not_depend_on_earlier_ones(self) -> None:
        """A strategy holds no state: planning other lengths changes neither earlier nor later plans."""
        what, names = "plans depend on the order in which they are made", ("at first", "after other plans")

        def check(case: PlanCase) -> None:
            first, fresh = case.plan(), DensePlan.of(planned(rebuilt(case.strategy), case.prompt, case.total))
            case.plan(case.shorter, case.shorter)
            case.plan(case.prompt + 1, case.total + 7)
            again = case.plan()
            invariants.check_same(first, again, case.where, what=what, names=names)
            for plan in (first, again):
                dense = DensePlan.of(plan, case.where)
                same = np.array_equal(dense.relative, fresh.relative, equal_nan=True)
                if not (same and np.array_equal(dense.scale, fresh.scale)):
                    violated(f"{case.where}{what}: a new strategy with the same parameters plans differently.")

        self._for_every_case(check)

    def test_frequencies(self) -> None:
        """``rotary`` changes exactly what is declared; a FrequencyStrategy moves no position."""

        def check(case: PlanCase) -> None:
            if isinstance(case.strategy, FrequencyStrategy):
                because = "a FrequencyStrategy keeps positions"
                invariants.check_identity(case.plan(), case.where, because=because)

        self._for_every_case(check)
        for _, strategy in self._strategies(window=512):
            check_rotary(strategy)

    def test_positions_per_frequency(self) -> None:
        """Positions have columns only if that is declared, and then one for each frequency of the model."""
        for _, strategy in self._strategies(window=self.windows[0]):
            for count in FREQUENCIES:
                try:
                    fitted = strategy.for_frequencies(count)
                except InvalidConfigError:
                    continue  # parameters for another number of them
                try:
                    fitted.checked_plan(self.max_prompt, self.max_prompt + self.max_new, frequencies=count)
                except PluginError as error:
                    violated(f"{strategy!r} for a model with {count} rotary frequencies: {error}")

    def test_lengths_reach_what_the_strategy_does(self) -> None:
        """The drawn lengths are long enough for the strategy to act; otherwise the other checks show nothing."""
        for _, strategy in self._strategies(window=self.windows[0]):
            near = planned(strategy, self.max_prompt, self.max_prompt + self.max_new)
            far = max(16 * (strategy.window or 0), 100_000)
            if near.is_identity and not planned(strategy, far, far).is_identity:
                violated(
                    f"{strategy!r}: every prompt up to max_prompt={self.max_prompt} tokens gets the identity plan, "
                    "so nothing was tested. Choose smaller parameters, or raise max_prompt."
                )

    @property
    def _factory(self) -> Factory:
        # Through the class: a plain function would be bound to self.
        factory: Factory = vars(self).get("strategy") or type(self).strategy
        return factory

    def _strategies(self, window: int = 64) -> list[tuple[Mapping[str, Any], PositionStrategy]]:
        return [(params, make_strategy(self._factory, window, params)) for params in self.params]

    def _for_every_case(self, check: Callable[[PlanCase], None]) -> None:
        lengths = LengthLimits(self.windows, self.max_prompt, self.max_new)
        for params in self.params:
            for_every_case(check, self._factory, params, lengths, self.settings)


def layer_strategies(strategy: PositionStrategy) -> list[PositionStrategy]:
    """The strategies of a model's layers."""
    by_layer = [strategy.for_layer(layer, LAYERS) for layer in range(LAYERS)]
    for layer, answer in enumerate(by_layer):
        if not isinstance(answer, PositionStrategy):
            violated(f"{strategy!r}.for_layer({layer}, {LAYERS}) returns {answer!r}, not a strategy.")
    return by_layer
