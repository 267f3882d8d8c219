"""The rules of lengths over time: which prompt length each query of a row plans with, and when a row re-plans.

The rules are explained in docs/internals/lengths-over-time.md. They depend on lengths and on what a strategy declares,
and keep no state. Lengths count a row's real tokens, padding not included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from posenc.errors import InvalidInputError
from posenc.positions import PositionStrategy

Reach = Callable[[int, int], NDArray[np.float64]]
"""``reach(prompt, total)``: the largest relative distance up to each query of that plan, float64 [total or more]."""


@dataclass(frozen=True)
class Schedule:
    """``(from_length, prompt)`` entries of one row: queries at that length or later use that prompt."""

    entries: tuple[tuple[int, int], ...] = ()

    def cropped(self, length: int) -> Schedule:
        """The schedule after the cache was cut back to ``length`` tokens."""
        return Schedule(tuple(entry for entry in self.entries if entry[0] <= length))

    def starting(self, length: int, prompt: int) -> Schedule:
        """The schedule that uses ``prompt`` from ``length`` tokens on."""
        earlier = tuple(entry for entry in self.entries if entry[0] < length)
        return self if earlier and earlier[-1][1] == prompt else Schedule((*earlier, (length, prompt)))

    def prompt_at(self, length: int) -> int:
        """Prompt length of the plan used by the query that makes the row ``length`` tokens long."""
        prompts = [prompt for start, prompt in self.entries if start <= length]
        assert prompts, "a row without tokens has no plan"
        return prompts[-1]

    def pieces(self, before: int, after: int) -> tuple[tuple[int, int, int], ...]:
        """``(from, to, prompt)`` runs of the new tokens ``before .. after - 1`` that share a plan."""
        cuts = sorted({before, *(start - 1 for start, _ in self.entries if before < start - 1 < after), after})
        return tuple((low, high, self.prompt_at(low + 1)) for low, high in pairwise(cuts))

    def extended(
        self,
        before: int,
        after: int,
        is_due: Callable[[int, int], bool],
        *,
        candidates: int = 0,
        announced: int | None = None,
    ) -> Schedule:
        """The schedule after a forward of ``after - before`` new tokens.

        Parameters
        ----------
        before, after : int
            The row's real tokens before and after the forward.
        is_due : callable
            ``is_due(prompt, length)``: whether the decoded token that makes the row ``length`` tokens long needs a
            new plan.
        candidates : int
            How many of the new tokens are candidates of assisted generation. They are treated as decoded one by one, so
            that greedy and assisted decoding see the same plans.
        announced : int, optional
            Final prompt length of a chunked prefill.

        Raises
        ------
        InvalidInputError
            If the forward brings more tokens than were announced.
        """
        schedule = self.cropped(before)
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
            if is_due(schedule.prompt_at(length), length):
                schedule = schedule.starting(length, length)
        return schedule


def must_replan(strategy: PositionStrategy, prompt: int, length: int, reach: Reach) -> bool:
    """Whether a row whose plan was made for ``prompt`` tokens re-plans at ``length`` tokens.

    With ``replan="auto"`` it does so when its plan reaches the window and a plan for the whole length would not, and,
    if the frequencies follow the length, at every token past the window.
    """
    rule, window = strategy.replan, strategy.window
    if length <= prompt or rule == "never":
        return False
    if isinstance(rule, int):
        return length - prompt >= rule
    if window is None:
        return False
    if strategy.capabilities.frequencies_by_length and length > window:
        return True
    if not _plan_changes(strategy, prompt) or reach(prompt, length)[length - 1] < window:
        return False
    return strategy.plan(length).max_relative < window


def next_attempt(strategy: PositionStrategy, prompt: int, total: int, reach: Reach) -> int:
    """The first length at which :func:`must_replan` may be True; beyond ``total`` if it is False up to there."""
    rule, window = strategy.replan, strategy.window
    if isinstance(rule, int):
        return prompt + rule
    if rule == "never" or window is None:
        return total + 1
    first = total + 1
    if strategy.capabilities.frequencies_by_length:
        first = max(prompt, window) + 1
    if _plan_changes(strategy, prompt):
        inside = int(np.searchsorted(reach(prompt, total), window))  # queries whose distances are inside the window
        first = min(first, max(prompt, inside) + 1)
    return first


def _plan_changes(strategy: PositionStrategy, prompt: int) -> bool:
    """Whether a plan for a longer prompt would place the same tokens differently."""
    return strategy.capabilities.uses_prompt or prompt <= strategy.active_from
