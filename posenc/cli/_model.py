"""Options that say how a model is loaded, shared by the verbs that load one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

DTYPES = ("float32", "bfloat16", "float16", "auto")
"""Those of ``ModelSpec``, which ``--help`` is too quick to import."""


def loading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--dtype`` and ``--device``."""
    dtype = click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="float32",
        show_default=True,
        help="Of the weights; 'auto' is the checkpoint's own.",
    )
    device = click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda:0, ...; 'auto' is a GPU where there is one."
    )
    return dtype(device(command))
