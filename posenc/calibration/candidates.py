"""Helpers for the class method ``calibration_grid(window, length)``, which declares what ``posenc calibrate`` tries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

BUDGET = 24
"""Most candidates of one strategy at one length, so that no strategy is searched harder than another."""


def parts(window: int, *eighths: float) -> list[int]:
    """Fractions of the window, given in eighths: distinct whole numbers, at least 1, ascending."""
    return sorted({max(1, int(window * part / 8)) for part in eighths})


def spread(low: float, high: float, count: int) -> list[int]:
    """Up to `count` distinct whole numbers, evenly spread on a log scale, both ends included."""
    low, high = max(1.0, low), max(1.0, high)
    steps = max(count - 1, 1)
    return sorted({round(math.exp(math.log(low) + (math.log(high) - math.log(low)) * k / steps)) for k in range(count)})


def compressions(beyond: float, room: float, multiples: Sequence[float]) -> list[float]:
    """Multiples of the factor that fits `beyond` tokens into `room` positions, at least 1, rounded to hundredths."""
    fitting = max(1.0, beyond / max(room, 1.0))
    return sorted({max(1.0, round(fitting * multiple, 2)) for multiple in multiples})


def near_windows(window: int, length: int, multiples: Sequence[float]) -> Iterator[tuple[int, list[float]]]:
    """Near windows of one, two and four eighths of `window`, each with factors that compress the rest of the input."""
    for near in parts(window, 1, 2, 4):
        yield near, compressions(length - near, window - near, multiples)


def factor_grid(window: int, length: int) -> list[dict[str, Any]]:
    """Candidates for ``factor`` of a frequency strategy, around the number of windows in the input."""
    multiples = (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 16)
    return [{"factor": factor} for factor in compressions(length, window, multiples)]
