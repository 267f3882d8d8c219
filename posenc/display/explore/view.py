"""What the page shows of one choice: pictures, where the window is left, cost, YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from posenc.display import viz
from posenc.display.cost import Cost, cost
from posenc.errors import InvalidInputError
from posenc.plan import PositionPlan
from posenc.plugins import strategy

LONGEST = 2**20
"""Tokens; a plan of this length takes a second."""


@dataclass(frozen=True)
class View:
    """Everything that the page shows of one plan; pictures are data URIs of PNG files."""

    plan: PositionPlan
    cost: Cost
    leaves: int | None
    position_map: str
    curve: str
    yaml: str


def look(name: str, *, window: int, prompt: int, params: dict[str, Any]) -> View:
    """Plan, draw and count.

    Raises
    ------
    PosencError
        If the strategy, a length or a parameter is wrong.
    """
    if prompt > LONGEST:
        raise InvalidInputError(f"prompt must be at most {LONGEST} tokens here, got {prompt}.")
    plan = strategy(name, window=window, **params).checked_plan(prompt)
    leaves = int((plan.reach >= window).argmax()) if plan.max_relative >= window else None
    return View(
        plan,
        cost(plan),
        leaves,
        _picture(lambda axis: viz.draw_map(axis, plan, title="position map")),
        _picture(lambda axis: viz.draw_curve(axis, plan)),
        configuration(name, params),
    )


def configuration(name: str, params: dict[str, Any]) -> str:
    """The content of a ``posenc.yaml`` with this choice."""
    chosen: Any = {"name": name, **params} if params else name
    return yaml.safe_dump({"strategy": chosen}, sort_keys=False, allow_unicode=True)


def _picture(draw: Callable[[Any], None]) -> str:
    figure = viz.new_figure(5.2, 4.2)
    draw(figure.subplots())
    return viz.data_uri(figure, dpi=110)
