"""Time two sides in turns in one process, so that a machine whose speed drifts affects both equally."""

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
        The first call of each side, which includes making plans and tables; it belongs to no round.
    plain, remapped : tuple of float
        One entry per round.
    baselines : mapping of str to tuple of float
        The further sides of every round, one entry per round.
    """

    first: tuple[float, float]
    plain: tuple[float, ...]
    remapped: tuple[float, ...]
    baselines: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


Sides = Mapping[str, Callable[[], Tensor]]
"""Calls that are timed in turns, by name."""

PLAIN, REMAPPED = "plain", "remapped"

Clock = Callable[[Callable[[], object]], float]
"""Measures the seconds of one call."""


def measure(pair: Pair, rounds: int, seconds: float, baselines: Sides | None = None) -> Timing:
    """Time both sides in turns on the CPU: plain, remapped, plain, ...

    Parameters
    ----------
    rounds : int
        Most rounds.
    seconds : float
        No further round starts after this time, if there have been three.
    baselines : mapping of str to callable, optional
        Further sides of every round.
    """
    first = (wall(pair.plain), wall(pair.remapped))
    return alternate(first, pair, baselines or {}, rounds, seconds, wall)


def alternate(
    first: tuple[float, float], pair: Pair, baselines: Sides, rounds: int, seconds: float, clock: Clock
) -> Timing:
    """Time all sides in turns with any clock."""
    sides = {PLAIN: pair.plain, REMAPPED: pair.remapped, **baselines}
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    start = time.perf_counter()
    while len(times[PLAIN]) < rounds and (len(times[PLAIN]) < LEAST_ROUNDS or time.perf_counter() - start < seconds):
        for name, side in sides.items():
            times[name].append(clock(side))
    by_side = {name: tuple(values) for name, values in times.items()}
    return Timing(first, by_side.pop(PLAIN), by_side.pop(REMAPPED), baselines=by_side)


def wall(call: Callable[[], object]) -> float:
    """Measure the seconds of one call by the wall clock."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
