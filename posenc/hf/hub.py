"""Load a model with its strategy, and remember the choice beside its config."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from posenc.config import Config, load_config, read_config
from posenc.errors import InvalidConfigError, InvalidInputError
from posenc.files import expanded, replacing
from posenc.hf.apply import apply
from posenc.hf.model_files import load_model

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
    InvalidInputError
        If transformers cannot load the model, or its files lack weights that its ``config.json`` describes.
    UnsupportedModelError
        If the model cannot be served exactly. Nothing is remembered then.
    """
    folder = expanded(path_or_name)
    source = str(folder if folder.is_dir() else path_or_name)
    looks_local = isinstance(path_or_name, os.PathLike) or source.startswith((".", "/", "~"))
    if looks_local and not folder.is_dir():
        raise InvalidConfigError(f"{source}: no such model folder. Give a folder with a config.json, or a hub name.")
    chosen = _read(config) if config is not None else _remembered(folder)
    model = load_model(source, **hf_kwargs)
    apply(model, chosen)
    if folder.is_dir() and config is not None:
        try:
            remember(chosen, folder)
        except InvalidInputError as error:
            logger.warning("the choice is not remembered: %s", error)
    return model


def remember(config: Config, folder: str | os.PathLike[str]) -> Path:
    """Write ``posenc.json`` beside a model's ``config.json``, whole or not at all.

    Raises
    ------
    InvalidInputError
        If it cannot be written.
    """
    target = expanded(folder) / FILE
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(config.as_dict(), indent=2) + "\n", encoding="utf-8")
    return target


def _read(config: Any) -> Config:
    if isinstance(config, Config):
        return config
    if isinstance(config, dict):
        return read_config(config if "strategy" in config else {"strategy": config})
    if isinstance(config, os.PathLike) or str(config).endswith((".yaml", ".yml")):
        return load_config(config)
    return read_config({"strategy": config})


def _remembered(folder: Path) -> Config:
    file = folder / FILE
    if not file.is_file():
        raise InvalidConfigError(
            f"{folder}: no {FILE} beside the model and no config given. Pass config='lampe', a dict or a YAML path."
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not JSON, not UTF-8, or brackets without end
        raise InvalidConfigError(f"{file}: cannot be read: {error}") from None
    return read_config(data, source=str(file))
