"""Make the candidates of a strategy, and hold every strategy to the same budget."""

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

    name: str
    params: dict[str, Any]
    window: int

    @cached_property
    def strategy(self) -> PositionStrategy:
        """The strategy with these parameters."""
        if self.name == IdentityStrategy.name:
            return IdentityStrategy(window=self.window)
        return strategy(self.name, window=self.window, **self.params)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.params.items())})"


def candidates(name: str, window: int, length: int) -> list[Candidate]:
    """The candidates of one strategy at one length.

    Raises
    ------
    UnknownNameError
        If no strategy has that name.
    InvalidConfigError
        If the strategy declares no candidates.
    PluginError
        If it declares more than the budget, or parameters that it refuses itself.
    """
    grid = strategies()[name].factory.calibration_grid(window, length)
    if not grid:
        others = [info.name for info in strategies().values() if info.factory.calibration_grid(window, 2 * window)]
        raise InvalidConfigError(
            f"strategy {name!r} cannot be calibrated: its class declares no calibration_grid. "
            f"These do: {', '.join(others)}."
        )
    if len(grid) > BUDGET:
        raise PluginError(
            f"strategy {name!r} declares {len(grid)} candidates for calibration; at most {BUDGET} are allowed, "
            "so that no strategy is searched harder than another."
        )
    declared = [Candidate(name, dict(params), window) for params in grid]
    for candidate in declared:
        try:
            _ = candidate.strategy
        except InvalidConfigError as error:
            raise PluginError(f"strategy {name!r} declares a candidate that it refuses: {error}") from None
    return declared
