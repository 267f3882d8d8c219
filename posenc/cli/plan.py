"""``posenc plan NAME``: the position map a strategy makes, without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from posenc.cli._output import json_option, print_json
from posenc.cli._strategy import param_option, read_pairs

if TYPE_CHECKING:
    from posenc.plan import PositionPlan


@click.command("plan", short_help="Explain and draw a strategy's positions.")
@click.argument("name")
@click.option("--prompt", type=int, required=True, metavar="N", help="Prompt length in tokens.")
@click.option("--total", type=int, metavar="N", help="Tokens present, generated ones included (default: the prompt).")
@click.option("--window", type=int, metavar="N", help="Pretraining window of the model in tokens.")
@param_option
@click.option("--plot", metavar="FILE.png", help="Draw the position map and the distance curve (png, pdf or svg).")
@json_option
def command(
    name: str,
    prompt: int,
    total: int | None,
    window: int | None,
    params: tuple[str, ...],
    plot: str | None,
    as_json: bool,
) -> None:
    """Explain the plan of strategy NAME: its segments, and which distance is seen as which."""
    from posenc.plugins import strategy

    plan = strategy(name, window=window, **read_pairs(params)).checked_plan(prompt, total)
    if plot is not None:
        from posenc.display.viz import plot_plan

        plot_plan(plan, plot)
    if as_json:
        print_json(describe(plan) | ({} if plot is None else {"plot": plot}))
        return
    click.echo(plan.explain())
    if plot is not None:
        click.echo(f"plot: {plot}")


def describe(plan: PositionPlan) -> dict[str, Any]:
    """A plan as plain data: lengths, segments of the last query, distance table."""
    from posenc.display.explain import relative_at, sample_distances, segment_pairs

    last = plan.total - 1
    segments = []
    for segment in plan.segments:
        start, stop = int(segment.key_start[last]), int(segment.key_stop[last])
        edges = [relative_at(plan, last, last - key) for key in (stop - 1, start)] if stop > start else []
        segments.append(
            {
                "name": segment.name,
                "pairs": segment_pairs(segment),
                "interpolation": segment.interpolation,
                "last_query_keys": [start, stop] if stop > start else None,
                "last_query_relative": [edge[1] for edge in edges if edge is not None] or None,
            }
        )
    distances = []
    for distance in sample_distances(plan.total):
        found = relative_at(plan, last, distance)
        distances.append(
            {
                "distance": distance,
                "relative": None if found is None else found[1],
                "segment": None if found is None else found[0],
            }
        )
    scale = plan.query_scale
    return {
        "strategy": plan.strategy,
        "prompt": plan.prompt,
        "total": plan.total,
        "window": plan.window,
        "is_identity": plan.is_identity,
        "max_relative": plan.max_relative,
        "query_scale": None if scale is None else [float(scale.min()), float(scale.max())],
        "segments": segments,
        "distances": distances,
    }
