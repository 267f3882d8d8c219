"""Options that choose a model and how to load it, shared by the verbs that load one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from posenc.evaluate.models import DType, Loaded

DTYPES = ("float32", "bfloat16", "float16", "auto")
"""The dtypes of ``ModelSpec``, repeated here because ``--help`` must not wait for its import."""

model_option = click.option(
    "--model", default="tiny", show_default=True, help="'tiny', 'smollm2', a folder or a hub name."
)


def loading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--dtype`` and ``--device``."""
    dtype = click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="float32",
        show_default=True,
        help="Dtype of the weights; 'auto' is the checkpoint's own.",
    )
    device = click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda:0, ...; 'auto' is a GPU if there is one."
    )
    return dtype(device(command))


def load_model(name: str, dtype: DType, device: str) -> Loaded:
    """Load the model that ``--model``, ``--dtype`` and ``--device`` choose.

    Raises
    ------
    InvalidInputError
        If there is no such model, it cannot be read, or its device is missing or too small.
    """
    from posenc.evaluate.models import ModelSpec, load

    return load(ModelSpec(name=name, dtype=dtype, device=device))
