"""``posenc calibrate``: choose a strategy's parameters for a model, by measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from posenc.cli._lengths import documents_option, lengths_in_windows, lengths_option, score_option
from posenc.cli._model import load_model, loading_options
from posenc.cli._output import (
    dry_run_option,
    duration,
    json_option,
    print_json,
    print_table,
    print_written,
    progress,
)
from posenc.cli._paths import FilePath, bundle_option

if TYPE_CHECKING:
    from posenc.calibration.file import Choice, LossScore, TextRecord
    from posenc.evaluate.calibrate.job import CalibrationJob, CalibrationOutcome
    from posenc.evaluate.calibrate.sweep import CandidateSweep
    from posenc.evaluate.models import DType
    from posenc.evaluate.perplexity import Mean

FEW = 30
"""Documents below which a warning is printed."""


@click.command("calibrate", short_help="Choose parameters for a model by measurement.")
@click.argument("model")
@click.option(
    "--text", "texts", multiple=True, default=("pydoc",), show_default=True, help="Text to choose on. Repeatable."
)
@click.option("--report-text", "report_texts", multiple=True, help="Another text, to report the choice on. Repeatable.")
@click.option("--strategy", "-s", "names", multiple=True, default=("lampe",), show_default=True, help="Repeatable.")
@lengths_option("Input lengths in tokens (default: 1, 2, 4 and 8 windows).")
@score_option
@documents_option(48, least=2)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the order of the documents and of the resampling."
)
@click.option(
    "--out", type=FilePath(), default=Path("out/calibrate"), show_default=True, help="Folder for cells and plots."
)
@click.option("--file", type=FilePath(), help="The calibration file (default: OUT/calibration.yaml).")
@bundle_option
@dry_run_option
@loading_options
@json_option
def command(
    model: str,
    dtype: DType,
    device: str,
    texts: tuple[str, ...],
    report_texts: tuple[str, ...],
    names: tuple[str, ...],
    lengths: tuple[int, ...] | None,
    scored: int,
    documents: int,
    seed: int,
    out: Path,
    file: Path | None,
    bundle: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Sweep the parameters of one or more strategies on MODEL and write a calibration file.

    MODEL and texts are those of 'posenc ppl'; a text may also be docstrings:PACKAGE, the docstrings of
    an installed package. A run that was stopped continues when the same command is given again.
    """
    from posenc.calibration.file import write
    from posenc.evaluate.calibrate import bundle as bundles
    from posenc.evaluate.calibrate import job as work
    from posenc.files import make_folder

    target = file or out / "calibration.yaml"
    loaded = load_model(model, dtype, device)
    if lengths is None:
        lengths = lengths_in_windows((1, 2, 4, 8), loaded.window)
    options = work.CalibrationOptions(
        tuple(dict.fromkeys(names)), texts, report_texts, lengths, documents, scored, seed, _command_line()
    )
    job = work.prepare(loaded, options)
    if dry_run:
        _print_dry_run(job, work.estimate_seconds(job), as_json)
        return
    for folder in (out / work.CELLS, target.parent, *([] if bundle is None else [bundle.parent])):
        make_folder(folder)
    if len(job.corpus.documents) < FEW:
        click.echo(
            f"only {len(job.corpus.documents)} documents: the choice will be uncertain. "
            f"A longer text or shorter lengths give more; {FEW} are a good minimum.",
            err=True,
        )
    with progress(job.tokens) as step:
        outcome = work.run(job, out, step)
    write(outcome.calibration, target)
    content = bundles.bundle(outcome)
    plots = _plots(outcome, out)
    files = [target, *([] if bundle is None else [bundles.write_bundle(content, bundle)]), *plots]
    if as_json:
        print_json(bundles.as_dict(content) | {"files": [str(path) for path in files]})
        return
    _print(outcome)
    print_written(files, plots=bool(plots))


def _command_line() -> str:
    """The command line of this process, quoted for a shell."""
    import shlex
    import sys

    return shlex.join(["posenc", *sys.argv[1:]])


def _plots(outcome: CalibrationOutcome, out: Path) -> list[Path]:
    """Draw the V-curves, if matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return []
    from posenc.evaluate.calibrate.picture import plot_sweeps

    native = outcome.calibration.native
    return [plot_sweeps(sweeps, native, out / f"v-curves-{name}.png") for name, sweeps in outcome.sweeps.items()]


def _print_dry_run(job: CalibrationJob, seconds: float, as_json: bool) -> None:
    """Print the candidates and an upper bound on the time."""
    documents = len(job.corpus.documents)
    if as_json:
        print_json(
            {
                "model": job.fingerprint.model_dump(),
                "window": job.window,
                "documents": documents,
                "seconds": seconds,
                "cells": [
                    {"length": length, "strategy": name, "params": candidate.params}
                    for name, grid in job.grids.items()
                    for length, candidates in grid.items()
                    for candidate in candidates
                ],
            }
        )
        return
    grids = [(name, length, candidates) for name, grid in job.grids.items() for length, candidates in grid.items()]
    rows = [
        [name, length, len(candidates), str(candidates[0]), str(candidates[-1])] for name, length, candidates in grids
    ]
    cells = sum(len(candidates) for _, _, candidates in grids)
    print_table(
        f"{cells} cells of up to {documents} documents, and the native model at every length",
        ["strategy", "tokens", "cells", "first", "last"],
        rows,
        numbers=["tokens", "cells"],
    )
    click.echo(f"at most {duration(seconds)} on this machine; dropping clearly bad candidates usually saves a third")


def _print(outcome: CalibrationOutcome) -> None:
    """Print every candidate's perplexity, the choices, and the fitted curve."""
    from posenc.report.tables import length_head

    calibration = outcome.calibration
    window = calibration.model.fingerprint.window
    heads = {length: length_head(length, window) for length in calibration.lengths}
    documents = calibration.settings.documents
    for name, sweeps in outcome.sweeps.items():
        print_table(
            f"{name}: perplexity of the last {calibration.settings.scored_tokens} tokens, {documents} documents, "
            "± error of the gap to the best (*); (n) dropped after n documents",
            ["parameters", *heads.values()],
            _curve_rows(sweeps, list(heads)),
            numbers=list(heads.values()),
        )
    rows = []
    for length in calibration.lengths:
        gaps = _gaps(outcome.reported.get(length, {}))
        scores = [_perplexity(calibration.native[length]), _perplexity(calibration.native_report.get(length))]
        choices = [["native", "", *scores]]
        choices += [[name, *_choice_cells(choice)] for name, choice in calibration.ranked(length)]
        if length in calibration.fitted:
            choices.append(["lampe (curve)", *_choice_cells(calibration.fitted[length])])
        rows += [[heads[length], *row, gaps.get(row[0], "")] for row in choices]
    texts = calibration.texts
    print_table(
        f"the choice, perplexity ± standard error on {_names(texts.calibration)}, and on {_names(texts.report)}; "
        "there also the paired gap to the lowest loss",
        ["tokens", "strategy", "parameters", "calibration", "report", "nats behind"],
        rows,
        numbers=["calibration", "report", "nats behind"],
    )
    if calibration.fit_in_words:
        click.echo(calibration.fit_in_words)


def _curve_rows(sweeps: dict[int, CandidateSweep], lengths: list[int]) -> list[list[str]]:
    """One row per candidate, one column per length."""
    import math

    cells: dict[str, dict[int, str]] = {}
    for length, sweep in sweeps.items():
        best = sweep.best
        for point in sweep.points:
            gap = sweep.gap_to_best(point)
            value = math.exp(min(best.losses.mean + gap.mean, 700.0))
            mark = f"({len(point.losses.values)})" if sweep.dropped(point) else "*" if point is best else ""
            params = ", ".join(f"{key}={value}" for key, value in point.candidate.params.items())
            error = "" if point is best else f" ± {value * gap.standard_error:.2f}"
            cells.setdefault(params, {})[length] = f"{value:.2f}{error} {mark}".strip()
    return [[params, *(by_length.get(length, "") for length in lengths)] for params, by_length in cells.items()]


def _gaps(reported: dict[str, Mean]) -> dict[str, str]:
    """Paired difference to the lowest loss on the report texts, by label."""
    if not reported:
        return {}
    best = min(reported.values(), key=lambda losses: losses.mean)
    gaps = {label: losses.minus(best) for label, losses in reported.items() if losses is not best}
    return {label: f"{gap.mean:.3f} ± {gap.standard_error:.3f}" for label, gap in gaps.items()}


def _choice_cells(choice: Choice) -> list[str]:
    from posenc.report.curves import in_words

    return [in_words(choice.params), _perplexity(choice.calibration), _perplexity(choice.report)]


def _perplexity(score: LossScore | None) -> str:
    return "" if score is None else score.perplexity


def _names(texts: Sequence[TextRecord]) -> str:
    return ", ".join(text.name for text in texts) or "no other text (--report-text)"
