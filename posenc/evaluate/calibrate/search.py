"""Which candidates of a strategy are tried, and the budget that every strategy is held to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from posenc.calibration.candidates import BUDGET
from posenc.errors import InvalidConfigError, PluginError
from posenc.plugins import strategies, strategy
from posenc.positions import IdentityStrategy, PositionStrategy


@dataclass(frozen=True)
class Candidate:
    """One strategy with the parameters to try."""

    strategy: str
    params: dict[str, Any]
    window: int

    @cached_property
    def made(self) -> PositionStrategy:
        """The strategy object."""
        if self.strategy == IdentityStrategy.name:
            return IdentityStrategy(window=self.window)
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
