"""Times of two sides that take turns in one process, so that a machine that drifts disturbs both alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

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
    """

    first: tuple[float, float]
    plain: tuple[float, ...]
    remapped: tuple[float, ...]


Clock = Callable[[Callable[[], object]], float]
"""Seconds of one call."""


def measure(pair: Pair, rounds: int, seconds: float) -> Timing:
    """Call both sides in turns on the CPU: plain, remapped, plain, ...

    Parameters
    ----------
    rounds : int
        Most rounds.
    seconds : float
        No further round starts once this time is used and there are three.
    """
    first = (wall(pair.plain), wall(pair.remapped))
    return Timing(first, *alternate(pair, rounds, seconds, wall))


def alternate(pair: Pair, rounds: int, seconds: float, clock: Clock) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Times of both sides in turns, by any clock."""
    plain: list[float] = []
    remapped: list[float] = []
    gc.collect()
    began = time.perf_counter()
    while len(plain) < rounds and (len(plain) < LEAST_ROUNDS or time.perf_counter() - began < seconds):
        plain.append(clock(pair.plain))
        remapped.append(clock(pair.remapped))
    return tuple(plain), tuple(remapped)


def wall(call: Callable[[], object]) -> float:
    """Seconds of one call by the wall clock."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
