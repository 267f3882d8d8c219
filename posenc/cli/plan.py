"""``posenc plan NAME``: the plan that a strategy makes, without a model."""

from __future__ import annotations

import click

from posenc.cli._output import json_option, print_json
from posenc.cli._strategy import param_option, read_pairs


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
    """Explain the plan of strategy NAME: its segments, and the relative position of every distance."""
    from posenc.display.explain import describe, explain
    from posenc.display.viz import plot_plan
    from posenc.plugins import strategy

    plan = strategy(name, window=window, **read_pairs(params)).checked_plan(prompt, total)
    if plot is not None:
        plot_plan(plan, plot)
    if as_json:
        print_json(describe(plan) | ({} if plot is None else {"plot": plot}))
        return
    click.echo(explain(plan))
    if plot is not None:
        click.echo(f"plot: {plot}")
