"""Load a model together with its strategy, and save the choice in the model's folder.

``posenc.from_pretrained`` is ``AutoModelForCausalLM.from_pretrained`` followed by ``posenc.apply``. It reads and writes
``posenc.json`` beside the model's ``config.json``.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from posenc.config import Config, config_of, read_config
from posenc.errors import InvalidConfigError, InvalidInputError
from posenc.files import expanded, write_json
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
        With the strategy applied; ``posenc.attached(model)`` returns its handle. If the model is a local folder, a
        given configuration is saved in its ``posenc.json``; a folder that cannot be written causes a warning.

    Raises
    ------
    InvalidConfigError
        If the path does not exist, or there is no configuration.
    InvalidInputError
        If transformers cannot load the model, or its files lack weights that its ``config.json`` describes.
    UnsupportedModelError
        If the model cannot be served exactly. Nothing is saved then.
    """
    folder = expanded(path_or_name)
    source = str(folder if folder.is_dir() else path_or_name)
    looks_local = isinstance(path_or_name, os.PathLike) or source.startswith((".", "/", "~"))
    if looks_local and not folder.is_dir():
        raise InvalidConfigError(f"{source}: no such model folder. Give a folder with a config.json, or a hub name.")
    choice = load_choice(folder) if config is None else config_of(config)
    model = load_model(source, **hf_kwargs)
    apply(model, choice)
    if folder.is_dir() and config is not None:
        try:
            save_choice(choice, folder)
        except InvalidInputError as error:
            logger.warning("the choice of strategy is not saved: %s", error)
    return model


def save_choice(config: Config, folder: str | os.PathLike[str]) -> Path:
    """Write ``posenc.json`` beside a model's ``config.json``, completely or not at all.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    InvalidInputError
        If the file cannot be written.
    """
    return write_json(config.as_dict(), expanded(folder) / FILE, indent=2)


def load_choice(folder: Path) -> Config:
    """Read the ``posenc.json`` of a model folder.

    Raises
    ------
    InvalidConfigError
        If there is no such file, or it cannot be read.
    """
    file = folder / FILE
    if not file.is_file():
        raise InvalidConfigError(
            f"{folder}: no {FILE} beside the model and no config given. Pass config='lampe', a dict or a YAML path."
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested too deeply
        raise InvalidConfigError(f"{file}: cannot be read: {error}") from None
    return read_config(data, source=str(file))
