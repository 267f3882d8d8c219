"""``posenc demo``: a model past its window, with and without remapping."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from posenc.cli._lengths import NumberList
from posenc.cli._output import json_option, print_json, print_table, print_written, progress
from posenc.cli._paths import FilePath, text_option
from posenc.cli._strategy import labels, read_configs

if TYPE_CHECKING:
    from posenc.config import Config
    from posenc.evaluate.demo import Demo
    from posenc.evaluate.demo_smollm2 import Answers


@click.command("demo", short_help="Run the main job: a model past its window.")
@click.option("--model", default="tiny", show_default=True, help="'tiny', 'smollm2' (passkeys), or a folder.")
@click.option("--config", "-c", metavar="FILE", help="Strategies to compare (default: examples/demo.yaml).")
@text_option
@click.option("--out", type=FilePath(), help="Folder for results and plots (default: out/demo).")
@click.option("--documents", type=click.IntRange(2), default=32, show_default=True, help="Most documents per length.")
@click.option("--lengths", type=NumberList(int), help="smollm2: prompt lengths (default 2048,4096,12288).")
@click.option("--depths", type=NumberList(float), help="smollm2: where the key is hidden (default 0.1,0.5,0.9).")
@json_option
def command(
    model: str,
    config: str | None,
    source: str,
    out: Path | None,
    documents: int,
    lengths: tuple[int, ...] | None,
    depths: tuple[float, ...] | None,
    as_json: bool,
) -> None:
    """Read past the window: perplexity and retrieval at 1x, 2x, 4x and 8x, under several strategies."""
    if model == "smollm2":
        _smollm2(config, source, out or Path("out/demo-smollm2"), lengths, depths, as_json)
        return
    if lengths or depths:
        raise click.UsageError("--lengths and --depths belong to --model smollm2.")

    from posenc.evaluate import demo as job
    from posenc.evaluate.models import load
    from posenc.evaluate.texts import read_text

    path = config or str(job.find_config())
    by_label = _by_label(path)
    text = read_text(source)
    loaded = load(model)
    comparison = job.prepare(loaded, text, documents=documents)
    with progress(comparison.steps(len(by_label))) as step:
        demo = job.run(loaded, comparison, by_label, step)
    files = job.write(demo, out or Path("out/demo"))
    if as_json:
        print_json({**demo.as_dict(), "files": [str(file) for file in files]})
        return
    unseen = " (not trained on)" if (model, source) == ("tiny", "pydoc") else ""
    click.echo(
        f"model {loaded.name} ({loaded.model.num_parameters() / 1e6:.2f}M parameters, window {loaded.window}), "
        f"text {text.name}{unseen}, strategies from {path}\n"
    )
    _print_tables(demo)
    click.echo(f"{_verdict(demo)}measured in {demo.seconds:.0f} s")
    print_written(files, plots=len(files) > 1)


def _by_label(path: str) -> dict[str, Config]:
    """The configurations of a file by their labels."""
    configs = read_configs(path)
    return dict(zip(labels(configs), configs, strict=True))


def _print_tables(demo: Demo) -> None:
    from posenc.cli.ppl import print_perplexities
    from posenc.report.tables import length_head

    comparison, window = demo.comparison, demo.loaded.window
    print_perplexities(
        f"perplexity of the last {comparison.perplexity.scored} tokens (lower is better), {comparison.documents} "
        "documents, ± SE",
        demo.scores,
        comparison.lengths,
        window,
    )
    heads = [length_head(length, window) for length in comparison.lengths]
    rows = []
    for label, scores in demo.scores.items():
        shares = [scores.retrieval[length].scores for length in comparison.lengths]
        rows.append([label, *(f"{share.mean:.2f} ± {share.standard_error:.2f}" for share in shares)])
    title = (
        "retrieval: share of a planted random span that is continued, "
        f"{comparison.retrieval_documents} documents (higher is better)"
    )
    print_table(title, ["strategy", *heads], rows, numbers=heads)


def _verdict(demo: Demo) -> str:
    """One sentence on what remapping gains at 4x, from paired differences."""
    import math

    if not {"rope", "lampe"} <= set(demo.scores):
        return ""
    length = demo.comparison.lengths[2]
    native, lampe = (demo.scores[label].perplexity[length].losses for label in ("rope", "lampe"))
    gap = native.minus(lampe)
    return (
        f"At {length} tokens plain RoPE's perplexity is {math.exp(gap.mean):.2f} times LaMPE's "
        f"(paired difference {gap.mean:.3f} ± {gap.standard_error:.3f} nats per token); "
    )


def _smollm2(
    config: str | None,
    source: str,
    out: Path,
    lengths: tuple[int, ...] | None,
    depths: tuple[float, ...] | None,
    as_json: bool,
) -> None:
    """Ask for passkeys inside and beyond the window of SmolLM2."""
    from posenc.evaluate import demo_smollm2 as job
    from posenc.evaluate.models import load
    from posenc.evaluate.tasks.base import Source
    from posenc.evaluate.texts import read_text
    from posenc.files import make_folder, write_json

    by_label = job.configs() if config is None else _by_label(config)
    text = read_text(source)
    click.echo("loading SmolLM2-135M-Instruct (about half a minute the first time)", err=True)
    loaded = load("smollm2")
    haystack = Source(loaded.tokenizer, text)
    prompts = job.make_prompts(haystack, lengths or job.LENGTHS, depths or job.DEPTHS)
    minutes = job.estimate_seconds(prompts, len(by_label)) / 60
    click.echo(
        f"{len(prompts) * len(by_label)} prompts, about {minutes:.0f} minutes on a machine with two cores", err=True
    )
    with progress(len(prompts) * len(by_label)) as step:
        answers = job.run(loaded, haystack, prompts, by_label, step)
    data: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "window": loaded.window,
        "text": text.name,
        "strategies": {label: result.as_dict() for label, result in answers.items()},
    }
    file = write_json(data, make_folder(out) / "results.json")
    if as_json:
        print_json({**data, "files": [str(file)]})
        return
    _print_answers(answers, loaded.window)
    print_written([file])


def _print_answers(answers: dict[str, Answers], window: int | None) -> None:
    """Print how many keys were answered by length, and every answer."""
    from posenc.report.tables import length_head

    lengths = sorted(next(iter(answers.values())).by_length())
    heads = [length_head(length, window) for length in lengths]
    rows = []
    for label, result in answers.items():
        counts = result.by_length()
        rows.append([label, *(f"{counts[length][0]}/{counts[length][1]}" for length in lengths)])
    print_table("passkeys found (whole key, greedy decoding)", ["strategy", *heads], rows, numbers=heads)
    details = [
        [
            label,
            row["length"],
            f"{row['depth']:g}",
            row["key"],
            " ".join(row["answer"].split()),
            f"{row['seconds']:.0f}",
        ]
        for label, result in answers.items()
        for row in result.rows
    ]
    columns = ["strategy", "tokens", "depth", "key", "answer", "seconds"]
    print_table("answers", columns, details, numbers=["tokens", "depth", "seconds"])
