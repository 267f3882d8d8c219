"""Load the models that are measured."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posenc.errors import InvalidInputError

TINY = "tiny"
SMOLLM2 = "smollm2"
SMALL = 10_000_000
"""Models with fewer parameters compute on one thread."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Loaded:
    """A model ready to be measured."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def window(self) -> int | None:
        """Pretraining window in tokens, as the model's configuration declares it."""
        found = getattr(self.model.config, "max_position_embeddings", None)
        return None if found is None else int(found)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Run small models on one thread inside the block.

        Their operations are so short that threads mostly wait for each other: on a busy machine
        with two cores, two threads took 20 times as long as one for the shipped model.
        """
        import torch

        before = torch.get_num_threads()
        if sum(parameter.numel() for parameter in self.model.parameters()) < SMALL:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def tiny_folder() -> Path:
    """Folder of the model that ships with posenc."""
    return Path(__file__).parents[1] / "models" / "tiny"


def load(name: str) -> Loaded:
    """Load a causal language model in float32 for inference.

    Parameters
    ----------
    name : str
        ``"tiny"`` (ships with posenc), ``"smollm2"`` (from a Python package), a folder, or a name
        on the Hugging Face hub.

    Raises
    ------
    InvalidInputError
        If there is no such model or it cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = locate(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInputError(f"{name}: not a model that transformers can load: {_first_line(error)}") from error
    model.eval()
    return Loaded(name, model, tokenizer)


def locate(name: str) -> str:
    """Where transformers finds a model: the folder of ``tiny`` or ``smollm2``, else the folder or hub name given.

    Raises
    ------
    InvalidInputError
        If it is none of these.
    """
    if name == TINY:
        if not (tiny_folder() / "config.json").is_file():
            raise InvalidInputError(
                "tiny: the shipped model is missing from this installation. Reinstall posenc, or pass --model FOLDER."
            )
        return str(tiny_folder())
    if name == SMOLLM2:
        from posenc.evaluate.smollm2 import prepare

        return str(prepare())
    if Path(name).is_dir():
        return name
    if Path(name).exists() or not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise InvalidInputError(
            f"{name}: no such model. Give a folder that save_pretrained wrote, a hub name such as "
            f"owner/model, or {TINY!r} for the model that ships with posenc."
        )
    return name


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
