"""Which parameters are tried.

A strategy declares them itself, in the class method ``calibration_grid(window, length)``; these are the
shapes that several share, and the budget that all are held to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from posenc.errors import InvalidConfigError, PluginError
from posenc.plugins import strategies, strategy
from posenc.positions import PositionStrategy

BUDGET = 24
"""Most candidates of one strategy at one length: no strategy is searched harder than another."""


@dataclass(frozen=True)
class Candidate:
    """One strategy with the parameters to try."""

    strategy: str
    params: dict[str, Any]
    window: int

    @cached_property
    def made(self) -> PositionStrategy:
        """The strategy object."""
        return strategy(self.strategy, window=self.window, **self.params)

    def __str__(self) -> str:
        return f"{self.strategy}({', '.join(f'{key}={value}' for key, value in self.params.items())})"


def candidates(name: str, window: int, length: int) -> list[Candidate]:
    """What is tried for one strategy at one length.

    Raises
    ------
    UnknownNameError
        If no strategy has that name.
    InvalidConfigError
        If the strategy declares nothing to try.
    PluginError
        If it declares more than the budget, or parameters that it refuses itself.
    """
    grid = strategies()[name].factory.calibration_grid(window, length)
    if not grid:
        able = [info.name for info in strategies().values() if info.factory.calibration_grid(window, 2 * window)]
        raise InvalidConfigError(
            f"strategy {name!r} cannot be calibrated: its class declares no calibration_grid. "
            f"These do: {', '.join(able)}."
        )
    if len(grid) > BUDGET:
        raise PluginError(
            f"strategy {name!r} declares {len(grid)} candidates for calibration; at most {BUDGET} are allowed, "
            "so that no strategy is searched harder than another."
        )
    found = [Candidate(name, dict(params), window) for params in grid]
    for candidate in found:
        try:
            _ = candidate.made
        except InvalidConfigError as error:
            raise PluginError(f"strategy {name!r} declares a candidate that it refuses: {error}") from None
    return found


def parts(window: int, *eighths: float) -> list[int]:
    """Distinct fractions of the window, given in eighths, at least 1."""
    return sorted({max(1, int(window * part / 8)) for part in eighths})


def spread(low: float, high: float, count: int) -> list[int]:
    """Up to `count` distinct whole numbers, evenly spread on a log scale, both ends included."""
    low, high = max(1.0, low), max(1.0, high)
    steps = max(count - 1, 1)
    return sorted({round(math.exp(math.log(low) + (math.log(high) - math.log(low)) * k / steps)) for k in range(count)})


def compressions(beyond: float, room: float, multiples: Sequence[float]) -> list[float]:
    """Factors around the one that fits `beyond` tokens into `room` positions, at least 1, rounded to hundredths."""
    fitting = max(1.0, beyond / max(room, 1.0))
    return sorted({max(1.0, round(fitting * multiple, 2)) for multiple in multiples})


def factor_grid(window: int, length: int) -> list[dict[str, Any]]:
    """``factor`` of a frequency strategy, around the number of windows in the input."""
    multiples = (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 16)
    return [{"factor": factor} for factor in compressions(length, window, multiples)]
