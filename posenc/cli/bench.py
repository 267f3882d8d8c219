"""``posenc bench``: the cost of remapped attention, compared with the same work without remapping."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from posenc.cli._lengths import Decorator, NumberList, lengths_option
from posenc.cli._output import json_option, print_json, print_table, progress
from posenc.cli._paths import FilePath

if TYPE_CHECKING:
    from posenc.bench.results import Result

SETTINGS = ("kind", "shape", "dtype", "threads", "backend")
"""Columns that are left out if they are equal in every row; the command above the table has them."""


def _repeatable(*names: str, metavar: str, help: str, default: str) -> Decorator:
    """An option that can be repeated; its default is that of ``BenchSettings``."""
    return click.option(*names, multiple=True, metavar=metavar, help=f"{help}; repeatable [default: {default}].")


@click.command("bench", short_help="Measure time and memory against plain attention.")
@click.argument("kinds", nargs=-1, metavar="[attention|query|prefill|decode|padded_attention|padded]...")
@_repeatable("--strategy", "-s", "strategies", metavar="NAME", help="Strategy to measure", default="five")
@lengths_option("Input lengths in tokens [default: 2048,4096].")
@_repeatable("--heads", metavar="HQ/HKVxD", help="Heads of raw tensors", default="9/3x64")
@click.option("--model", metavar="SHAPE", help="smollm2-135m or tiny, with random weights [default: smollm2-135m].")
@_repeatable("--dtype", "dtypes", metavar="DTYPE", help="Dtype of tensors and weights", default="float32")
@click.option("--threads", type=NumberList(int), help="Numbers of torch threads [default: 2].")
@_repeatable("--backend", "backends", metavar="NAME", help="Backend of the remapped side", default="auto")
@click.option("--device", metavar="DEVICE", help="cpu, or cuda for attention and query [default: cpu].")
@_repeatable("--cache", "caches", metavar="CACHE", help="For query: rotated or raw", default="rotated")
@click.option("--window-share", type=int, help="The window is the length divided by this [default: 4].")
@click.option("--rounds", type=int, help="Most rounds per case [default: 7].")
@click.option("--seconds", type=float, help="Start no further round after this time, but make three [default: 20].")
@click.option("--memory/--no-memory", default=True, help="Measure peak memory, in separate processes.")
@click.option("--out", type=FilePath(), help="A .json file, or a folder to write one into.")
@click.option("--plot", type=FilePath(), metavar="FILE.png", help="Draw the ratio over the length.")
@click.option(
    "--report",
    type=FilePath(),
    metavar="FOLDER",
    help="Measure nothing: write FOLDER/performance.md from its result files.",
)
@json_option
def command(
    kinds: tuple[str, ...],
    out: Path | None,
    plot: Path | None,
    report: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure what remapping costs, alternating with the same work without it.

    \b
    attention         L queries over L raw keys, against rotation and one causal SDPA call
    query             one query over L keys, raw or cached rotated (--cache), against SDPA over rotated ones
    prefill           a model's forward of L tokens, against the model not patched
    decode            a model's forward of one token with L cached tokens, against the model not patched
    padded_attention  one layer's attention of a padded batch of 4 rows, against its rows one by one
    padded            a model's forward of a padded batch of 4 rows, against its rows one by one

    Without a kind, attention is measured. Times are medians over rounds; each round gives one ratio.
    """
    if report is not None:
        if kinds or out or plot:
            raise click.UsageError("--report measures nothing: give no kind, --out or --plot with it.")
        _write_report(report, as_json)
        return
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if kinds:
        given["kinds"] = tuple(dict.fromkeys(kinds))
    result, files = _measure(given, out, plot)
    if as_json:
        print_json({**result.model_dump(), "files": [str(file) for file in files]})
        return
    _print(result)
    for file in files:
        click.echo(f"written: {file}")


def _write_report(folder: Path, as_json: bool) -> None:
    from posenc.bench.report import write_report

    page = write_report(folder)
    if as_json:
        print_json({"file": str(page)})
    else:
        click.echo(f"written: {page}")


def _measure(settings: dict[str, Any], out: Path | None, plot: Path | None) -> tuple[Result, list[Path]]:
    """Check everything, measure, and write the files."""
    from posenc.bench.picture import check_plot, plot_ratios
    from posenc.bench.results import is_file, save
    from posenc.bench.run import run, steps
    from posenc.bench.settings import BenchSettings
    from posenc.files import make_folder

    run_settings = BenchSettings(**settings)
    run_settings.check()
    if out is not None:
        make_folder(out.parent if is_file(out) else out)
    if plot is not None:
        check_plot(plot)
        make_folder(plot.parent)
    with progress(steps(run_settings)) as step:
        result = run(run_settings, step)
    files = [] if out is None else [save(result, out)]
    if plot is not None:
        files.append(plot_ratios(result, plot))
    return result, files


def _print(result: Result) -> None:
    """Print the machine, the command, and a table without empty columns and without equal settings."""
    from posenc.bench.report import BASELINES, NOTHING, NUMBERS, columns, describe_machine, table_rows

    names, rows = columns(result), table_rows(result)
    informative = []
    for column, name in enumerate(names):
        values = {row[column] for row in rows}
        if values != {NOTHING} and (name not in SETTINGS or len(values) > 1):
            informative.append(column)
    click.echo(describe_machine(result.machine))
    click.echo(result.command)
    click.echo()
    print_table(
        "remapped against plain (medians over rounds)",
        [names[column] for column in informative],
        [[row[column] for column in informative] for row in rows],
        numbers=[*NUMBERS, *BASELINES],
    )
