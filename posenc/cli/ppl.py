"""``posenc ppl``: perplexity at several lengths, with standard errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from posenc.cli._lengths import documents_option, lengths_in_windows, lengths_option, score_option
from posenc.cli._model import load_model, loading_options, model_option
from posenc.cli._output import json_option, print_json, print_table, progress
from posenc.cli._paths import text_option
from posenc.cli._strategy import choose_configs, labels, param_option, strategies_option

if TYPE_CHECKING:
    from posenc.evaluate.compare import StrategyScores
    from posenc.evaluate.models import DType


@click.command("ppl", short_help="Measure perplexity at several lengths.")
@model_option
@text_option
@strategies_option
@param_option
@click.option("--config", "-c", "files", multiple=True, metavar="FILE", help="YAML: one configuration or a list.")
@lengths_option("Input lengths in tokens (default: 1, 2 and 4 windows).")
@score_option
@documents_option(32, least=1)
@loading_options
@json_option
def command(
    model: str,
    dtype: DType,
    device: str,
    source: str,
    names: tuple[str, ...],
    params: tuple[str, ...],
    files: tuple[str, ...],
    lengths: tuple[int, ...] | None,
    scored: int,
    documents: int,
    as_json: bool,
) -> None:
    """Measure perplexity on a text, on the same documents for every strategy.

    Every length scores the same last tokens of the same documents; only how much text precedes
    them differs. Documents do not overlap if the text is long enough.
    """
    configs = choose_configs(names, params, files)  # complain about these before anything heavy is loaded

    from posenc.evaluate.compare import compare, prepare
    from posenc.evaluate.tasks.base import Source
    from posenc.evaluate.tasks.prose import check_lengths
    from posenc.evaluate.texts import read_text

    text = read_text(source)
    if lengths is not None:
        check_lengths(lengths, scored)
    loaded = load_model(model, dtype, device)
    if lengths is None:
        lengths = lengths_in_windows((1, 2, 4), loaded.window)
        check_lengths(lengths, scored)
    comparison = prepare(Source(loaded.tokenizer, text), lengths, scored=scored, documents=documents)
    by_label = dict(zip(labels(configs), configs, strict=True))
    with progress(comparison.steps(len(by_label))) as step:
        scores = compare(loaded, by_label, comparison, step)
    if as_json:
        print_json(
            {
                "model": loaded.name,
                "dtype": loaded.dtype,
                "window": loaded.window,
                "text": text.name,
                "documents": comparison.documents,
                "scored_tokens": scored,
                "strategies": {label: result.as_dict() for label, result in scores.items()},
            }
        )
        return
    print_perplexities(
        f"perplexity of the last {scored} tokens, {comparison.documents} documents of {text.name}, ± standard error",
        scores,
        lengths,
        loaded.window,
    )


def print_perplexities(
    title: str, scores: Mapping[str, StrategyScores], lengths: Sequence[int], window: int | None
) -> None:
    """Print one row per strategy and one column per length."""
    from posenc.report.tables import length_head

    heads = [length_head(length, window) for length in lengths]
    rows = []
    for label, result in scores.items():
        perplexities = [result.perplexity[length] for length in lengths]
        rows.append([label, *(f"{score.value:.2f} ± {score.standard_error:.2f}" for score in perplexities)])
    print_table(title, ["strategy", *heads], rows, numbers=heads)
