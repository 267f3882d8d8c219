"""``posenc eval SUITE.yaml``: measure strategies x lengths x tasks x seeds, one cell at a time, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from posenc.cli._output import dry_run_option, duration, json_option, print_json, print_table, progress
from posenc.cli._paths import FilePath, bundle_option
from posenc.cli._strategy import read_pairs

if TYPE_CHECKING:
    from posenc.evaluate.sweep.results import Sweep
    from posenc.evaluate.sweep.run import PlannedSweep


@click.command("eval", short_help="Run a suite of evaluations; resumes.")
@click.argument("suite", metavar="SUITE.yaml")
@click.option("--out", type=FilePath(), help="Results folder [default: out/eval/NAME].")
@click.option(
    "--executor",
    type=click.Choice(["in-process", "processes", "slurm"]),
    default="in-process",
    show_default=True,
    help="Where to measure.",
)
@click.option(
    "--workers", type=click.IntRange(1), default=2, show_default=True, help="Worker processes, or Slurm jobs."
)
@click.option("--slurm", "options", multiple=True, metavar="KEY=VALUE", help="Option for submitit. Repeatable.")
@bundle_option
@dry_run_option
@json_option
def command(
    suite: str,
    out: Path | None,
    executor: Any,
    workers: int,
    options: tuple[str, ...],
    bundle: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure the cells of SUITE.yaml that the results folder lacks.

    A cell is one strategy, length, task and seed, and one file of the folder. You can stop this at any time, even with
    kill -9, and start it again: measured cells are kept.
    """
    slurm = read_pairs(options, option="--slurm")
    if slurm and executor != "slurm":
        raise click.UsageError("--slurm belongs to --executor slurm.")

    from posenc.evaluate.sweep import run
    from posenc.evaluate.sweep.executors import Execution
    from posenc.evaluate.sweep.results import write_sweep

    planned = run.plan(suite, out)
    missing = planned.missing
    if dry_run:
        _print_plan(planned, as_json)
        return
    if bundle is not None and not bundle.parent.is_dir():
        raise click.UsageError(f"--bundle: there is no folder {bundle.parent}.")
    with progress(sum(cell.tokens for cell in missing)) as step:
        sweep = run.execute(planned, Execution(executor, workers, slurm), step)
    files = [planned.folder.path] if bundle is None else [planned.folder.path, write_sweep(sweep, bundle)]
    if as_json:
        print_json({**sweep.model_dump(exclude_none=True), "files": [str(file) for file in files]})
        return
    _print_results(sweep)
    cells = len({cell.id for cell in planned.cells})
    click.echo(f"{len(missing)} cells measured, {cells - len(missing)} were there already")
    for file in files:
        click.echo(f"results: {file}")


def _print_plan(planned: PlannedSweep, as_json: bool) -> None:
    """Print the cells with an estimate of their time."""
    from posenc.evaluate.sweep.estimate import seconds_per_cell

    loaded = planned.session.loaded(planned.suite.model)
    seconds = seconds_per_cell(loaded, planned.cells, planned.folder.timings())
    missing = {cell.id for cell in planned.missing}
    rows = [
        {
            "id": cell.id,
            "strategy": cell.label,
            "task": cell.task["task"],
            "tokens": cell.length,
            "seed": cell.seed,
            "done": cell.id not in missing,
            "seconds": round(estimate, 1),
        }
        for cell, estimate in zip(planned.cells, seconds, strict=True)
    ]
    left = sum({row["id"]: float(row["seconds"]) for row in rows if not row["done"]}.values())
    if as_json:
        print_json({"folder": str(planned.folder.path), "cells": rows, "seconds_left": round(left, 1)})
        return
    table = [[*list(row.values())[:5], "done" if row["done"] else "to do", f"{row['seconds']:.1f}"] for row in rows]
    columns = ["cell", "strategy", "task", "tokens", "seed", "state", "seconds"]
    print_table(
        f"{planned.suite.name}: {len(rows)} cells", columns, table, numbers=["cell", "tokens", "seed", "seconds"]
    )
    click.echo(f"{len(missing)} cells to do, about {duration(left)} in one process (a rough estimate)")
    click.echo(f"results folder: {planned.folder.path}")


def _print_results(sweep: Sweep) -> None:
    """Print one table per task."""
    from posenc.report.tables import length_head, score_tables

    for table in score_tables(sweep):
        heads = [length_head(length, sweep.window) for length in table.lengths]
        rows = [
            [label, *("-" if score is None else score.shown for score in scores)]
            for label, scores in table.rows.items()
        ]
        print_table(table.title, ["strategy", *heads], rows, numbers=heads)
