"""A model type for lm-evaluation-harness: ``--model posenc --model_args pretrained=...,strategy=lampe``.

The harness finds it after :func:`register`, which ``posenc lm-eval`` calls. Needs the extra ``posenc[lm-eval]``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from posenc.config import Config, load_config, read_config
from posenc.errors import InvalidConfigError, PosencError

NAME = "posenc"
DEFAULT_WINDOWS = 16
"""Inputs may be this many windows long, unless ``max_length`` says otherwise."""


def register() -> None:
    """Register ``--model posenc`` with the harness.

    Raises
    ------
    PosencError
        If lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval.api.registry import model_registry
    except ImportError:
        raise PosencError("lm-evaluation-harness is not installed. Run: pip install 'posenc[lm-eval]'") from None
    import lm_eval.models  # noqa: F401  (registers the harness's own names first, so that a clash shows here)

    if NAME not in model_registry:
        model_registry.register(NAME, target="posenc.evaluate.harness_model:PosencLM")


def run(arguments: Sequence[str]) -> None:
    """Run the harness's own command line with these arguments.

    Raises
    ------
    PosencError
        If lm-evaluation-harness is not installed.
    """
    register()
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    before, sys.argv = sys.argv, ["posenc lm-eval", *arguments]  # the harness reads nothing else
    try:
        parser = HarnessCLI()
        parser.execute(parser.parse_args())
    finally:
        sys.argv = before


def split_arguments(
    arguments: dict[str, Any], *, strategy: str | None, frequencies: str | None, config: str | None, backend: str | None
) -> tuple[Config, dict[str, Any]]:
    """Split ``model_args`` into a configuration and the arguments of the harness.

    Parameters
    ----------
    arguments : dict
        Every other argument; those that are parameters of the strategy go to it.

    Raises
    ------
    InvalidConfigError
        If there is no strategy, or two.
    """
    if (strategy is None) == (config is None):
        raise InvalidConfigError("model_args: give either strategy=NAME or config=FILE.yaml.")
    if config is not None:
        return load_config(config), arguments
    from posenc.plugins import strategies

    assert strategy is not None
    params = {key: value for key, value in arguments.items() if key in strategies()[strategy].params.model_fields}
    data: dict[str, Any] = {"strategy": {"name": strategy, **params}, "backend": backend or "auto"}
    if frequencies is not None:
        data["frequencies"] = frequencies
    others = {key: value for key, value in arguments.items() if key not in params}
    return read_config(data, source="model_args"), others
