"""Which prompt length each row's plan is made for, and when a live model re-plans.

The rules of strategies.md, "Lengths over time", in one place. Lengths count a row's real tokens.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from posenc.errors import InvalidInputError, PluginError, UnsupportedModelError
from posenc.plan import PositionPlan
from posenc.planning.concerns import concerns
from posenc.planning.memory import held_bytes
from posenc.positions import PositionStrategy
from posenc.rope import Rotary

logger = logging.getLogger("posenc")

HEADROOM = 256
"""Tokens a plan is built ahead of the current length, so that decoding slices instead of rebuilding."""

KEPT_BYTES = 128 * 2**20
"""Memory of the plans that a model keeps, and of what backends have derived from them."""

KEPT_PLANS = 64
"""Plans that one look ahead may make, and frequencies and schedules that are kept."""

TRIED = 1024
"""Longest prompt that is tried when a strategy is applied."""
ATTEMPTS = 512
"""How often :meth:`Planner.future` tries whether a new plan would fit the window."""


@dataclass(frozen=True)
class Schedule:
    """``(from_length, prompt)`` entries of one row: queries at that length or later use that prompt."""

    entries: tuple[tuple[int, int], ...] = ()

    def cropped(self, length: int) -> Schedule:
        """The schedule after the cache was cut back to ``length`` tokens."""
        return Schedule(tuple(entry for entry in self.entries if entry[0] <= length))

    def starting(self, length: int, prompt: int) -> Schedule:
        """From ``length`` tokens on, use ``prompt``."""
        kept = tuple(entry for entry in self.entries if entry[0] < length)
        return self if kept and kept[-1][1] == prompt else Schedule((*kept, (length, prompt)))

    def prompt_at(self, length: int) -> int:
        """Prompt length of the plan used by the query that makes the row ``length`` tokens long."""
        found = [prompt for start, prompt in self.entries if start <= length]
        assert found, "a row without tokens has no plan"
        return found[-1]

    def pieces(self, before: int, after: int) -> tuple[tuple[int, int, int], ...]:
        """``(from, to, prompt)`` runs of the new tokens ``before .. after - 1`` that share a plan."""
        cuts = sorted({before, *(start - 1 for start, _ in self.entries if before < start - 1 < after), after})
        return tuple((low, high, self.prompt_at(low + 1)) for low, high in pairwise(cuts))


class Planner:
    """Plans and rotaries of one strategy, kept while they are useful.

    Parameters
    ----------
    strategy : PositionStrategy
        Makes the plans.
    layers : int
        How many attention layers ask for plans; 0 where only the strategy itself is asked.
    """

    def __init__(self, strategy: PositionStrategy, layers: int = 0) -> None:
        self.strategy, self.layers = strategy, layers
        self._own = _own_planners(strategy, layers)
        self._room = KEPT_BYTES
        self._forget()

    def _forget(self) -> None:
        self._plans: dict[int, PositionPlan] = {}
        self._sizes: dict[int, int] = {}
        self._used: set[int] = set()  # since their size was taken: backends may have derived more
        self._rotaries: dict[tuple[Rotary, int], Rotary] = {}
        self._said: set[str] = set()
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, object]) -> Planner:
        return Planner(self.strategy, self.layers)

    def __getstate__(self) -> dict[str, object]:
        return {"strategy": self.strategy, "layers": self.layers, "_own": self._own, "_room": self._room}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._forget()

    def of(self, layer: int) -> Planner:
        """The planner of one attention layer: this one, unless the strategy's layers see different positions."""
        return self._own[layer] if self._own else self

    @property
    def by_layer(self) -> bool:
        """True when the layers see different positions."""
        return bool(self._own)

    def try_out(self, bases: Sequence[Rotary | None] = ()) -> None:
        """Plan a few lengths in and beyond the window, so that a broken strategy is found before the first forward.

        Parameters
        ----------
        bases : sequence of Rotary or None
            The model's own frequencies by attention layer, where there is a model.

        Raises
        ------
        PluginError
            If a plan breaks the partition or cannot be made.
        InvalidConfigError
            If the strategy cannot start from the frequencies that the model has.
        """
        window = min(self.strategy.window or TRIED, TRIED)
        own: dict[Planner, dict[Rotary, None]] = {}
        for layer, base in enumerate(bases):
            if base is not None:
                own.setdefault(self.of(layer), {})[base] = None
        for planner in dict.fromkeys(self._own) or (self,):
            for prompt, total in ((1, 1), (window // 2 + 1, window // 2 + 2), (window + 1, window + 9)):
                planner.strategy.checked_plan(prompt, total)
                for base in own.get(planner, ()):
                    planner.strategy.checked_plan(prompt, total, frequencies=len(base.inv_freq))
        for planner, rotaries in own.items():
            for base in rotaries:
                planner.strategy.check_frequencies(base)

    def plan(self, prompt: int, total: int) -> PositionPlan:
        """The plan for a prompt, for the first ``total`` tokens (fewer than the prompt in chunked prefill)."""
        return self._covering(prompt, total).prefix(total)

    def _covering(self, prompt: int, total: int) -> PositionPlan:
        with self._lock:  # several threads may run one model
            known = self._plans.pop(prompt, None)
            if known is None or known.total < total:
                room = 0 if total <= prompt else max(HEADROOM, total // 8)
                self._sizes.pop(prompt, None)
                known = self.strategy.checked_plan(prompt, max(prompt, total + room))
                self._say_concerns(known)
                self._make_room(held_bytes(known))
            self._plans[prompt] = known  # last used, last dropped
            self._used.add(prompt)
            return known

    def _say_concerns(self, plan: PositionPlan) -> None:
        """Warn of each kind of concern once, not at every prompt."""
        for kind, message in concerns(self.strategy, plan).items():
            if kind not in self._said:
                self._said.add(kind)
                logger.warning("%s", message)

    def _make_room(self, wanted: int) -> None:
        """Drop plans, the least recently used first, until those that are left and so many bytes more fit."""
        for prompt in self._used & self._plans.keys():
            self._sizes[prompt] = held_bytes(self._plans[prompt])
        self._used.clear()
        held = wanted + sum(self._sizes.values())
        while self._plans and held > self._room:
            prompt = next(iter(self._plans))
            del self._plans[prompt]
            held -= self._sizes.pop(prompt)

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        """The strategy's frequencies for a prompt, one object per base of equal numbers and prompt."""
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
        """The schedule after a forward of ``after - before`` new tokens.

        Parameters
        ----------
        before, after : int
            The row's real tokens before and after the forward.
        candidates : int
            How many of the new tokens are guesses of assisted generation: they are treated as
            decoded one by one, so that greedy and assisted decoding see the same plans.
        announced : int, optional
            Final prompt length of a chunked prefill.

        Raises
        ------
        InvalidInputError
            If the forward brings more tokens than were announced.
        """
        schedule = schedule.cropped(before)
        if after == before:
            return schedule
        settled = after - candidates
        if announced is not None and before < announced:
            if settled > announced:
                raise InvalidInputError(
                    f"a prompt of {announced} tokens was announced, but this forward makes it {settled}. "
                    "Announce the final length with handle.prompt_length(n), or leave the block before the next turn."
                )
            schedule = schedule.starting(before + 1, announced)
            before = settled
        elif before == 0 or settled - before > 1:
            schedule = schedule.starting(before + 1, settled)
            before = settled
        for length in range(before + 1, after + 1):
            prompt = schedule.prompt_at(length)
            if self._must_replan(prompt, length):
                schedule = schedule.starting(length, length)
        return schedule

    def future(self, schedule: Schedule, length: int, total: int) -> Schedule | None:
        """The schedule of a row of ``length`` tokens once it was decoded up to ``total``.

        Returns
        -------
        Schedule or None
            None where that takes more than :data:`KEPT_PLANS` new plans, or :data:`ATTEMPTS` attempts at one.
        """
        made = 0
        for _ in range(ATTEMPTS):
            length = max(length + 1, self._first_doubt(schedule.prompt_at(length), total))
            if length > total:
                return schedule
            if self._must_replan(schedule.prompt_at(length), length):
                schedule, made = schedule.starting(length, length), made + 1
            if made > KEPT_PLANS:
                return None
        return None

    def _first_doubt(self, prompt: int, total: int) -> int:
        """The first length, up to ``total``, at which :meth:`_must_replan` may say yes."""
        rule, window, able = self.strategy.replan, self.strategy.window, self.strategy.capabilities
        if isinstance(rule, int):
            return prompt + rule
        found = total + 1
        if rule == "never" or window is None:
            return found
        if able.frequencies_by_length:
            found = max(prompt, window) + 1
        if self._by_prompt(prompt):
            reach = self._covering(prompt, total).reach
            found = min(found, max(prompt, int(np.searchsorted(reach, window))) + 1)
        return found

    def _by_prompt(self, prompt: int) -> bool:
        """Whether a plan for a longer prompt would be another one."""
        return self.strategy.capabilities.uses_prompt or prompt <= self.strategy.active_from

    def _must_replan(self, prompt: int, length: int) -> bool:
        if self._own:
            return any(planner._must_replan(prompt, length) for planner in dict.fromkeys(self._own))
        rule, window, able = self.strategy.replan, self.strategy.window, self.strategy.capabilities
        if length <= prompt or rule == "never":
            return False
        if isinstance(rule, int):
            return length - prompt >= rule
        if window is None:
            return False
        if able.frequencies_by_length and length > window:
            return True
        if not self._by_prompt(prompt) or self._covering(prompt, length).reach[length - 1] < window:
            return False
        return self.strategy.plan(length).max_relative < window


def _own_planners(strategy: PositionStrategy, layers: int) -> list[Planner]:
    """One planner per layer, the same for layers that share a strategy; none where all share the given one."""
    chosen = [strategy.for_layer(layer, layers) for layer in range(layers)]
    for layer, own in enumerate(chosen):
        if not isinstance(own, PositionStrategy):
            raise PluginError(f"strategy {strategy.name!r}: for_layer({layer}, {layers}) returns {own!r}, no strategy.")
    if all(own is strategy for own in chosen):
        return []
    planners = {own.fingerprint: Planner(own) for own in chosen}
    for planner in planners.values():
        planner._room = KEPT_BYTES // len(planners)
    return [planners[own.fingerprint] for own in chosen]


def fitted(strategy: PositionStrategy, bases: Sequence[Rotary | None]) -> PositionStrategy:
    """The strategy for the number of rotary frequencies that a model has.

    Raises
    ------
    UnsupportedModelError
        If layers have different numbers of them, and the strategy would not be the same for all.
    """
    counts = sorted({len(base.inv_freq) for base in bases if base is not None})
    made = [strategy.for_frequencies(count) for count in counts]
    if len(made) == 1:
        return made[0]
    if any(own is not strategy for own in made):
        raise UnsupportedModelError(
            f"strategy {strategy.name!r} has positions that differ by rotary frequency, and the layers of this model "
            f"have different numbers of them ({', '.join(map(str, counts))})."
        )
    return strategy
