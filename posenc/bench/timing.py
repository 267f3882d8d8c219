"""Times of two sides that take turns in one process, so that a machine that drifts disturbs both alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Pair:
    """The two sides of a case; each call computes once and returns its output."""

    plain: Callable[[], Tensor]
    remapped: Callable[[], Tensor]


@dataclass(frozen=True)
class Timing:
    """Seconds of every call.

    Parameters
    ----------
    first : (float, float)
        The first call of each side, plans and tables included; not among the rounds.
    plain, remapped : tuple of float
        One entry per round.
    baselines : mapping of str to tuple of float
        What else took its turn in every round.
    """

    first: tuple[float, float]
    plain: tuple[float, ...]
    remapped: tuple[float, ...]
    baselines: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


Sides = Mapping[str, Callable[[], Tensor]]
"""Calls that take turns, by name."""

PLAIN, REMAPPED = "plain", "remapped"

Clock = Callable[[Callable[[], object]], float]
"""Seconds of one call."""


def measure(pair: Pair, rounds: int, seconds: float, baselines: Sides | None = None) -> Timing:
    """Call both sides in turns on the CPU: plain, remapped, plain, ...

    Parameters
    ----------
    rounds : int
        Most rounds.
    seconds : float
        No further round starts once this time is used and there are three.
    baselines : mapping of str to callable, optional
        More sides of every round.
    """
    first = (wall(pair.plain), wall(pair.remapped))
    return alternate(first, pair, baselines or {}, rounds, seconds, wall)


def alternate(
    first: tuple[float, float], pair: Pair, baselines: Sides, rounds: int, seconds: float, clock: Clock
) -> Timing:
    """Times of all sides in turns, by any clock."""
    sides = {PLAIN: pair.plain, REMAPPED: pair.remapped, **baselines}
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    began = time.perf_counter()
    while len(times[PLAIN]) < rounds and (len(times[PLAIN]) < LEAST_ROUNDS or time.perf_counter() - began < seconds):
        for name, side in sides.items():
            times[name].append(clock(side))
    found = {name: tuple(values) for name, values in times.items()}
    return Timing(first, found.pop(PLAIN), found.pop(REMAPPED), found)


def wall(call: Callable[[], object]) -> float:
    """Seconds of one call by the wall clock."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
