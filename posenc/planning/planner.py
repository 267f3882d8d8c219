"""The plans and frequencies of a live model: each is made once, and kept while it is useful."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from posenc.errors import PluginError, UnsupportedModelError
from posenc.plan import PositionPlan
from posenc.planning.concerns import concerns
from posenc.planning.memory import held_bytes
from posenc.planning.schedule import Schedule, must_replan, next_attempt
from posenc.positions import PositionStrategy
from posenc.rope import Rotary

logger = logging.getLogger("posenc")

HEADROOM = 256
"""Tokens that a plan is built ahead of the current length, so that decoding slices it instead of building a new one."""

KEPT_BYTES = 128 * 2**20
"""Memory of the plans that a model keeps, and of what backends have derived from them."""

KEPT_PLANS = 64
"""Most new plans of one :meth:`Planner.future`, and most frequencies and schedules that are kept."""

LONGEST_TRIAL = 1024
"""Longest prompt, in tokens, of the trial when a strategy is applied."""

ATTEMPTS = 512
"""How often :meth:`Planner.future` tries whether a new plan would stay inside the window."""


class Planner:
    """Plans and frequencies of one strategy; several threads may use it.

    Parameters
    ----------
    strategy : PositionStrategy
        The strategy that makes the plans.
    layers : int
        Number of attention layers; 0 for a planner of the strategy itself, without layers.

    Raises
    ------
    PluginError
        If the strategy's ``for_layer`` returns something else than a strategy.
    """

    def __init__(self, strategy: PositionStrategy, layers: int = 0) -> None:
        self.strategy, self.layers = strategy, layers
        self._layer_planners = _layer_planners(strategy, layers)
        self._room = KEPT_BYTES
        self._forget()

    def _forget(self) -> None:
        self._plans: dict[int, PositionPlan] = {}
        self._sizes: dict[int, int] = {}
        self._used: set[int] = set()  # prompts whose plans were used after they were measured, so may have grown
        self._rotaries: dict[tuple[Rotary, int], Rotary] = {}
        self._warned: set[str] = set()
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, object]) -> Planner:
        return Planner(self.strategy, self.layers)

    def __getstate__(self) -> dict[str, object]:
        kept = ("strategy", "layers", "_layer_planners", "_room")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._forget()

    def of(self, layer: int) -> Planner:
        """The planner of one attention layer: this one, unless the strategy's layers see different positions."""
        return self._layer_planners[layer] if self._layer_planners else self

    @property
    def by_layer(self) -> bool:
        """True when the layers see different positions."""
        return bool(self._layer_planners)

    def try_out(self, bases: Sequence[Rotary | None] = ()) -> None:
        """Plan a few lengths inside and beyond the window, so that a broken strategy fails before the first forward.

        Parameters
        ----------
        bases : sequence of Rotary or None
            The model's own frequencies by attention layer; empty without a model.

        Raises
        ------
        PluginError
            If a plan breaks the partition or cannot be made.
        InvalidConfigError
            If the strategy cannot start from the frequencies that the model has.
        """
        window = min(self.strategy.window or LONGEST_TRIAL, LONGEST_TRIAL)
        rotaries: dict[Planner, dict[Rotary, None]] = {}
        for layer, base in enumerate(bases):
            if base is not None:
                rotaries.setdefault(self.of(layer), {})[base] = None
        for planner in dict.fromkeys(self._layer_planners) or (self,):
            for prompt, total in ((1, 1), (window // 2 + 1, window // 2 + 2), (window + 1, window + 9)):
                planner.strategy.checked_plan(prompt, total)
                for base in rotaries.get(planner, ()):
                    planner.strategy.checked_plan(prompt, total, frequencies=len(base.inv_freq))
        for planner, distinct in rotaries.items():
            for base in distinct:
                planner.strategy.check_frequencies(base)

    def plan(self, prompt: int, total: int) -> PositionPlan:
        """The plan for a prompt, cut to the first ``total`` tokens (fewer than the prompt in chunked prefill)."""
        return self._covering(prompt, total).prefix(total)

    def _covering(self, prompt: int, total: int) -> PositionPlan:
        """The kept plan for a prompt, made again if it is shorter than ``total`` tokens."""
        with self._lock:
            plan = self._plans.pop(prompt, None)
            if plan is None or plan.total < total:
                ahead = 0 if total <= prompt else max(HEADROOM, total // 8)
                self._sizes.pop(prompt, None)
                plan = self.strategy.checked_plan(prompt, max(prompt, total + ahead))
                self._warn_of_concerns(plan)
                self._make_room(held_bytes(plan))
            self._plans[prompt] = plan  # last in the order, so dropped last
            self._used.add(prompt)
            return plan

    def _warn_of_concerns(self, plan: PositionPlan) -> None:
        """Warn of each kind of concern once, not at every prompt."""
        for kind, message in concerns(self.strategy, plan).items():
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("%s", message)

    def _make_room(self, needed: int) -> None:
        """Drop plans, the least recently used first, until ``needed`` more bytes fit."""
        for prompt in self._used & self._plans.keys():
            self._sizes[prompt] = held_bytes(self._plans[prompt])
        self._used.clear()
        held = needed + sum(self._sizes.values())
        while self._plans and held > self._room:
            prompt = next(iter(self._plans))
            del self._plans[prompt]
            held -= self._sizes.pop(prompt)

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        """The strategy's frequencies for a prompt: the same object for equal ``base`` and prompt."""
        key = (base, prompt if self.strategy.capabilities.frequencies_by_length else 0)
        with self._lock:
            if key not in self._rotaries:
                while len(self._rotaries) >= KEPT_PLANS:
                    self._rotaries.pop(next(iter(self._rotaries)))
                self._rotaries[key] = self.strategy.checked_rotary(base, prompt)
            return self._rotaries[key]

    def extend(
        self, schedule: Schedule, before: int, after: int, *, candidates: int = 0, announced: int | None = None
    ) -> Schedule:
        """The schedule of a row after a forward of ``after - before`` new tokens, see :meth:`Schedule.extended`."""
        return schedule.extended(before, after, self._must_replan, candidates=candidates, announced=announced)

    def future(self, schedule: Schedule, length: int, total: int) -> Schedule | None:
        """The schedule of a row of ``length`` tokens after it was decoded up to ``total``.

        Returns
        -------
        Schedule or None
            None if that takes more than :data:`KEPT_PLANS` new plans, or :data:`ATTEMPTS` attempts at one.
        """
        plans = 0
        for _ in range(ATTEMPTS):
            length = max(length + 1, next_attempt(self.strategy, schedule.prompt_at(length), total, self._reach))
            if length > total:
                return schedule
            if self._must_replan(schedule.prompt_at(length), length):
                schedule, plans = schedule.starting(length, length), plans + 1
            if plans > KEPT_PLANS:
                return None
        return None

    def _must_replan(self, prompt: int, length: int) -> bool:
        if self._layer_planners:
            return any(planner._must_replan(prompt, length) for planner in dict.fromkeys(self._layer_planners))
        return must_replan(self.strategy, prompt, length, self._reach)

    def _reach(self, prompt: int, total: int) -> NDArray[np.float64]:
        return self._covering(prompt, total).reach


def _layer_planners(strategy: PositionStrategy, layers: int) -> list[Planner]:
    """One planner per layer, shared by layers whose strategies are equal; none if all layers use the given strategy."""
    by_layer = [strategy.for_layer(layer, layers) for layer in range(layers)]
    for layer, answer in enumerate(by_layer):
        if not isinstance(answer, PositionStrategy):
            raise PluginError(
                f"strategy {strategy.name!r}: for_layer({layer}, {layers}) returns {answer!r}, not a strategy."
            )
    if all(layer_strategy is strategy for layer_strategy in by_layer):
        return []
    planners = {layer_strategy.fingerprint: Planner(layer_strategy) for layer_strategy in by_layer}
    for planner in planners.values():
        planner._room = KEPT_BYTES // len(planners)
    return [planners[layer_strategy.fingerprint] for layer_strategy in by_layer]


def fitted(strategy: PositionStrategy, bases: Sequence[Rotary | None]) -> PositionStrategy:
    """The strategy for the number of rotary frequencies that a model has.

    Raises
    ------
    UnsupportedModelError
        If layers have different numbers of them, and the strategy would not be the same for all.
    """
    counts = sorted({len(base.inv_freq) for base in bases if base is not None})
    by_count = [strategy.for_frequencies(count) for count in counts]
    if len(by_count) == 1:
        return by_count[0]
    if any(variant is not strategy for variant in by_count):
        raise UnsupportedModelError(
            f"strategy {strategy.name!r} has positions that differ by rotary frequency, and the layers of this model "
            f"have different numbers of them ({', '.join(map(str, counts))})."
        )
    return strategy
