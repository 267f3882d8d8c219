"""The content of the page for one choice: pictures, where positions leave the window, cost, YAML."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from posenc.display import viz
from posenc.display.cost import Cost, cost
from posenc.display.explain import first_query_beyond
from posenc.errors import InvalidInputError
from posenc.plan import PositionPlan
from posenc.plugins import strategy

LONGEST = 2**20
"""Most tokens of a prompt; a plan of this length takes a second."""


@dataclass(frozen=True)
class View:
    """Everything that the page shows of one plan.

    Parameters
    ----------
    first_beyond : int or None
        The first query with a relative position outside the window; None if all are inside.
    position_map, curve : str
        Pictures, as data URIs of PNG files.
    yaml : str
        The content of a ``posenc.yaml``.
    """

    plan: PositionPlan
    cost: Cost
    first_beyond: int | None
    position_map: str
    curve: str
    yaml: str


def make_view(name: str, *, window: int, prompt: int, params: dict[str, Any]) -> View:
    """Plan, draw, and count the cost.

    Raises
    ------
    PosencError
        If the strategy is unknown, or a length or a parameter is invalid.
    """
    if prompt > LONGEST:
        raise InvalidInputError(f"prompt must be at most {LONGEST} tokens here, got {prompt}.")
    plan = strategy(name, window=window, **params).checked_plan(prompt)
    return View(
        plan=plan,
        cost=cost(plan),
        first_beyond=first_query_beyond(plan, window),
        position_map=_picture(lambda axis: viz.draw_map(axis, plan, title="position map")),
        curve=_picture(lambda axis: viz.draw_curve(axis, plan)),
        yaml=configuration(name, params),
    )


def configuration(name: str, params: dict[str, Any]) -> str:
    """Write a ``posenc.yaml`` with this choice."""
    choice: Any = {"name": name, **params} if params else name
    return yaml.safe_dump({"strategy": choice}, sort_keys=False, allow_unicode=True)


def _picture(draw: Callable[[Any], None]) -> str:
    figure = viz.new_figure(5.2, 4.2)
    draw(figure.subplots())
    return viz.data_uri(figure, dpi=110)
