"""The generated parts of a page: ``<!-- posenc: PART [NAME] -->`` is replaced by what the function PART returns.

The mark is a comment, so that a page also reads well without the generated part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click

import posenc
from posenc.calibration import file as record
from posenc.calibration import recommend as choice
from posenc.cli import show
from posenc.cli._group import group

ROOT = Path(__file__).parents[2]
MARK = re.compile(r"^<!-- posenc: (\w+)(?: (\w+))? -->$", re.MULTILINE)
SIZE = 16
"""head_dim of the model whose frequencies are shown."""


def fill(markdown: str) -> str:
    """Return a page with its generated parts filled in.

    Raises
    ------
    KeyError
        If a mark names no part.
    """
    return MARK.sub(lambda mark: PARTS[mark[1]](*([mark[2]] if mark[2] else [])), markdown)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [columns, ["---"] * len(columns), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")


def strategies() -> str:
    """List every built-in strategy with a link to its page."""
    infos = (info for info in posenc.strategies().values() if info.distribution == "posenc")
    rows = ((f"[`{info.name}`]({info.name}.md)", info.kind, info.summary, info.paper) for info in infos)
    return table(["name", "changes", "what the model sees", "paper"], rows)


def facts(name: str) -> str:
    """Return the paper and the capabilities of a strategy."""
    data = show.describe(posenc.strategies()[name])
    capabilities = ", ".join(f"`{key}`" for key, value in data["capabilities"].items() if value)
    return f"{data['paper']}.\n\nCapabilities: {capabilities or 'none'} ([what they promise](../write-a-strategy.md))."


def parameters(name: str) -> str:
    """Return the table of a strategy's parameters, from its pydantic model."""
    params = show.describe(posenc.strategies()[name])["params"]
    rows = ((f"`{p['name']}`", _type(p["type"]), _default(p["default"]), p["description"]) for p in params)
    return table(["name", "type", "default", "meaning"], rows) if params else "None."


def _type(name: str) -> str:
    """Return a union in words: a pipe would end the table's cell."""
    return " or ".join(f"`{part}`" for part in name.split(" | ") if part != "None")


def _default(value: object) -> str:
    return "" if value is None else f"`{value:.6g}`" if isinstance(value, float) else f"`{value}`"


def frequencies(name: str) -> str:
    """Show by how much a frequency strategy divides each frequency, for a prompt of four windows."""
    window = 256
    base = posenc.Rotary.from_theta(10_000.0, SIZE)
    changed = posenc.strategy(name, window=window).rotary(base, 4 * window)
    rows = []
    for number, (old, new) in enumerate(zip(base.inv_freq.tolist(), changed.inv_freq.tolist(), strict=True)):
        length = 2 * 3.141592653589793 / old
        rows.append([number, f"{length:.4g}", f"{window / length:.3g}", f"{old / new:.4g}"])
    shown = table(["frequency", "wavelength in tokens", "rotations in the window", "divided by"], rows)
    factor = changed.attention_scaling / base.attention_scaling
    return f"{shown}\n\ncos and sin are multiplied by {factor:.5g}, logits by its square, {factor**2:.5g}."


def measured(name: str) -> str:
    """Return the rows of a strategy in docs/results/results.md.

    Raises
    ------
    LookupError
        If it has no row there.
    """
    tables = _rows_of_results((ROOT / "docs" / "results" / "results.md").read_text(encoding="utf-8"), name)
    if not tables:
        raise LookupError(f"docs/results/results.md has no row of {name!r}: measure it with benchmarks/main.yaml")
    return "\n\n".join(tables) + "\n\n[All results](../results/results.md) have more numbers, with standard errors."


def picks() -> str:
    """The picks of ``auto`` on the shipped model, with their scores on the text that was not used for the choice."""
    profile = ROOT / "posenc" / "profiles" / "tiny.yaml"
    calibration = record.read(profile)
    rows = []
    for chosen in choice.recommend(calibration, source=profile.name).ranges:
        length, pick = chosen.up_to, chosen.pick
        native = calibration.native_report[length].perplexity
        taken = native
        if pick.strategy != choice.NATIVE:
            score = calibration.strategies[pick.strategy][length].report
            assert score is not None
            taken = score.perplexity
        rows.append([length, f"`{pick}`", taken, native])
    text = calibration.texts.report[0].name
    shown = table(["prompt up to", "pick", "perplexity of the pick", "of the unmodified model"], rows)
    return f"Perplexity on `{text}`, which was not used for the choice, ± standard error (`make calibrate`):\n\n{shown}"


def _rows_of_results(text: str, name: str) -> list[str]:
    """Return the main tables that contain the strategy, reduced to its rows, each below its command."""
    tables = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        command = re.search(r"^```\w*\n(.+?)\n```", section, re.MULTILINE | re.DOTALL)
        if not section.startswith(("main\n", "calibrated\n")) or command is None:
            continue
        for heading, body in re.findall(r"^### (.+?)\n\n(\|.+?)(?:\n\n|\Z)", section, re.MULTILINE | re.DOTALL):
            head, rule, *rows = body.splitlines()
            matching = [row for row in rows if re.match(rf"\| {name}\b(?!\+)", row)]
            if matching and "by depth" not in heading and "times the lowest" not in heading:
                tables.append(f"{heading.split(': ')[-1]} (`{command[1]}`):\n\n" + "\n".join([head, rule, *matching]))
    return tables


def comparison() -> str:
    """Return the two main tables of docs/results/results.md in full."""
    text = (ROOT / "docs" / "results" / "results.md").read_text(encoding="utf-8")
    main = text.split("\n## main\n")[1].split("\n## ")[0]
    tables = re.findall(r"^### ((?:perplexity: perplexity|spans: share right), .+?)\n\n(\|.+?)\n\n", main, re.M | re.S)
    return "\n\n".join(f"{heading.split(': ')[-1]}:\n\n{_linked(body)}" for heading, body in tables)


def _linked(body: str) -> str:
    """Link the strategies of a table to their pages."""
    return re.sub(
        r"^\| (\w+)(?= \|)",
        lambda cell: f"| [`{cell[1]}`](strategies/{cell[1]}.md)" if cell[1] in posenc.strategies() else cell[0],
        body,
        flags=re.M,
    )


def commands() -> str:
    """Return what every verb prints for --help."""
    parts = []
    with click.Context(group, info_name="posenc", max_content_width=100, terminal_width=100) as outer:
        for verb in group.list_commands(outer):
            command = group.get_command(outer, verb)
            assert command is not None
            parts += _help(command, verb, outer)
    return "\n\n".join(parts)


def _help(command: click.Command, name: str, outer: click.Context) -> list[str]:
    """Return the help of a command and of its subcommands."""
    settings = {**command.context_settings, "max_content_width": 100, "terminal_width": 100}
    with click.Context(command, info_name=name, parent=outer, **settings) as context:
        parts = [f"## {context.command_path}\n\n```text\n{command.get_help(context)}\n```"]
        if isinstance(command, click.Group):
            for inner in command.list_commands(context):
                subcommand = command.get_command(context, inner)
                assert subcommand is not None
                parts += _help(subcommand, inner, context)
    return parts


PARTS: dict[str, Callable[..., str]] = {
    part.__name__: part for part in (strategies, facts, parameters, frequencies, measured, picks, comparison, commands)
}
