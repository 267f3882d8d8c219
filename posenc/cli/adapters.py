"""``posenc adapters``: every measured model family and its verdict."""

from __future__ import annotations

import json
from typing import Any

import click

from posenc.cli._output import json_option, print_json, print_table
from posenc.errors import UnknownNameError


@click.command("adapters", short_help="List model families: exact, or refused and why.")
@click.option("--exact", is_flag=True, help="List only the families that are exact.")
@click.argument("family", nargs=-1)
@json_option
def command(exact: bool, family: tuple[str, ...], as_json: bool) -> None:
    """List the measured verdict on every causal-LM family of transformers, or on each FAMILY.

    A family that is not listed may be exact too: the probe decides when posenc is applied to a model.
    """
    from importlib.resources import files  # 8 ms that --help need not wait for

    measured: dict[str, Any] = json.loads((files("posenc_adapters") / "families.json").read_text(encoding="utf-8"))
    verdicts: dict[str, str] = measured["families"]
    unknown = [name for name in family if name not in verdicts]
    if unknown:
        raise UnknownNameError(
            f"transformers {measured['transformers']} has no causal-LM family named {unknown[0]!r} "
            "(config.model_type). 'posenc adapters' lists all."
        )
    rows = [
        [name, verdict]
        for name, verdict in verdicts.items()
        if (not family or name in family) and (not exact or verdict == "exact")
    ]
    if as_json:
        print_json([{"family": name, "verdict": verdict} for name, verdict in rows])
    else:
        print_table(f"families of transformers {measured['transformers']} ({len(rows)})", ["family", "verdict"], rows)
