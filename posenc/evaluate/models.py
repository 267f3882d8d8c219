"""Load models for measurements."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from posenc.checkpoint import window_of
from posenc.errors import InvalidInputError, UnsupportedModelError
from posenc.files import expanded
from posenc.hf.model_files import first_line, load_model, load_tokenizer, quiet_transformers

TINY = "tiny"
SMOLLM2 = "smollm2"
SMALL = 10_000_000
"""Models with fewer parameters compute on one thread."""
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
DType = Literal["float32", "bfloat16", "float16", "auto"]
AUTO = "auto"
logger = logging.getLogger(__name__)


class ModelSpec(BaseModel):
    """A model and how to load it.

    Parameters
    ----------
    name : str
        ``"tiny"`` (ships with posenc), ``"smollm2"`` (from a Python package), a folder, or a name
        on the Hugging Face hub.
    dtype : str
        Dtype of the weights; ``"auto"`` is the checkpoint's own.
    device : str
        Torch's name of it, such as ``"cpu"`` or ``"cuda:1"``; ``"auto"`` is the first CUDA GPU that torch sees,
        else the CPU.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = TINY
    dtype: DType = "float32"
    device: str = AUTO

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        keys = list(cls.model_fields)
        if isinstance(value, str):
            return {"name": value}
        if not isinstance(value, dict) or value.keys() - keys:
            raise ValueError(f"expected a model's name, or a mapping with the keys {', '.join(keys)}")
        return value


@dataclass(frozen=True)
class Loaded:
    """A loaded model and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def window(self) -> int | None:
        """Pretraining window in tokens that the model's configuration declares, or None if it declares none."""
        try:
            return window_of(self.model.config)
        except UnsupportedModelError:
            return None

    @property
    def dtype(self) -> str:
        """Torch's name for the dtype of the weights."""
        return str(self.model.dtype)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Run small models on one thread inside the block.

        Their operations are so short that threads mostly wait for each other: for the shipped model on a busy
        machine with two cores, two threads took 20 times as long as one.
        """
        import torch

        before = torch.get_num_threads()
        if sum(parameter.numel() for parameter in self.model.parameters()) < SMALL:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def end_tokens(model: Any) -> tuple[int, ...]:
    """The tokens at which generation ends: none, one or several, as the checkpoint declares."""
    ends = model.generation_config.eos_token_id
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(map(int, ends))


def pad_token(model: Any) -> int:
    """A token for generation to pad with: the checkpoint's own, an end token, or 0."""
    declared = model.generation_config.pad_token_id
    return int(declared) if declared is not None else next(iter(end_tokens(model)), 0)


def tiny_folder() -> Path:
    """Folder of the model that ships with posenc."""
    return Path(__file__).parents[1] / "models" / "tiny"


def load(which: ModelSpec | str) -> Loaded:
    """Load a causal language model for inference.

    Parameters
    ----------
    which : ModelSpec or str
        A bare name is loaded in float32 on the CPU.

    Raises
    ------
    InvalidInputError
        If there is no such model, it cannot be read, or its device is missing or too small.
    """
    quiet_transformers()
    spec = which if isinstance(which, ModelSpec) else ModelSpec(name=which, device="cpu")
    source, device = locate(spec.name), find_device(spec.device)
    tokenizer = load_tokenizer(source, called=spec.name)
    model = load_model(source, called=spec.name, dtype=spec.dtype)
    try:
        model.to(device)
    except RuntimeError as error:
        raise InvalidInputError(
            f"{spec.name}: cannot be put on {device} in {model.dtype}: {first_line(error)}. Use a smaller dtype "
            "(bfloat16) or another device."
        ) from error
    model.eval()
    return Loaded(spec.name, model, tokenizer)


def find_device(name: str) -> str:
    """Torch's name of a device; for ``"auto"`` the first CUDA GPU that torch sees, else the CPU.

    Raises
    ------
    InvalidInputError
        If torch knows no such device, or the machine has none.
    """
    import torch

    if name == AUTO:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        logger.info("device auto: %s", device)
        return device
    try:
        torch.empty(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:
        raise InvalidInputError(
            f"device {name!r}: torch cannot use it here ({first_line(error)}). "
            "Give cpu, a device such as cuda:0, or auto."
        ) from error
    return name


def locate(name: str) -> str:
    """What transformers loads a model from: the folder of ``tiny`` or ``smollm2``, else `name`, a folder or hub name.

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
    path = expanded(name)
    if path.is_dir():
        return str(path)
    if path.exists() or not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise InvalidInputError(
            f"{name}: no such model. Give a folder that save_pretrained wrote, a hub name such as "
            f"owner/model, or {TINY!r} for the model that ships with posenc."
        )
    return name
