"""Load a model with its strategy, and remember the choice beside its config."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from posenc.config import Config, load_config, read_config
from posenc.errors import InvalidConfigError
from posenc.handle import apply

FILE = "posenc.json"

logger = logging.getLogger("posenc")


def from_pretrained(path_or_name: str | os.PathLike[str], config: Any = None, **hf_kwargs: Any) -> Any:
    """Load a causal language model with transformers and apply a strategy to it.

    Parameters
    ----------
    path_or_name : str or path
        What ``AutoModelForCausalLM.from_pretrained`` takes.
    config : Config, dict, name or path, optional
        By default the ``posenc.json`` beside the model's ``config.json``.
    **hf_kwargs
        Passed to transformers.

    Returns
    -------
    transformers.PreTrainedModel
        With the strategy applied; ``posenc.attached(model)`` returns its handle. A configuration given
        for a local folder is remembered in its ``posenc.json`` (a folder that cannot be written is warned of).

    Raises
    ------
    InvalidConfigError
        If the path does not exist, or no configuration is given or found.
    """
    from transformers import AutoModelForCausalLM

    source = str(path_or_name)
    looks_local = isinstance(path_or_name, os.PathLike) or source.startswith((".", "/", "~"))
    if looks_local and not Path(source).expanduser().is_dir():
        raise InvalidConfigError(f"{source}: no such model folder. Give a folder with a config.json, or a hub name.")
    chosen = _read(config) if config is not None else _remembered(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, **hf_kwargs)
    except (OSError, ValueError) as error:
        raise InvalidConfigError(f"{source}: transformers cannot load it: {error}") from error
    apply(model, chosen)
    if Path(source).is_dir() and config is not None:
        try:
            remember(chosen, source)
        except InvalidConfigError as error:
            logger.warning("the choice is not remembered: %s", error)
    return model


def remember(config: Config, folder: str | os.PathLike[str]) -> Path:
    """Write ``posenc.json`` beside a model's ``config.json``, whole or not at all."""
    target = Path(folder) / FILE
    draft = target.with_suffix(".json.partial")
    try:
        draft.write_text(json.dumps(config.as_dict(), indent=2) + "\n", encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise InvalidConfigError(f"{target}: cannot be written ({error.strerror or error}).") from None
    return target


def _read(config: Any) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, dict):
        return read_config(config if "strategy" in config else {"strategy": config})
    if isinstance(config, os.PathLike) or str(config).endswith((".yaml", ".yml")):
        return load_config(config)
    return read_config({"strategy": config})


def _remembered(source: str) -> Config:
    file = Path(source) / FILE
    if not file.is_file():
        raise InvalidConfigError(
            f"{source}: no {FILE} beside the model and no config given. Pass config='lampe', a dict or a YAML path."
        )
    try:
        return read_config(json.loads(file.read_text(encoding="utf-8")), source=str(file))
    except (OSError, json.JSONDecodeError) as error:
        raise InvalidConfigError(f"{file}: cannot be read: {error}") from None
