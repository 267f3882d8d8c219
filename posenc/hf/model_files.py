"""Load a checkpoint with transformers, and explain why one cannot be loaded.

On a damaged folder transformers raises whatever its libraries raise, and it fills missing weights with random numbers.
Here both are errors that name the folder and the cause. ``posenc.from_pretrained`` and the command line load models
through this module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posenc.errors import InvalidInputError, PosencError

LFS_POINTER = b"version https://git-lfs.github.com/"
WEIGHTS = "model.safetensors"
NAMED = 2
"""How many tensors a message names at most."""

logger = logging.getLogger("posenc")


def quiet_transformers() -> None:
    """Make transformers log errors only, and show no progress bars, in this process."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_model(source: str, *, called: str | None = None, **options: Any) -> Any:
    """Load a causal language model, with every weight from its checkpoint.

    Parameters
    ----------
    source : str
        Folder or hub name.
    called : str, optional
        Its name in messages, by default ``source``.
    **options
        Passed to ``AutoModelForCausalLM.from_pretrained``. With ``ignore_mismatched_sizes=True``, weights that are
        missing or do not fit are left to transformers, which fills them with random numbers.

    Raises
    ------
    InvalidInputError
        If it cannot be loaded, or the files do not hold the weights that its ``config.json`` describes.
    """
    from transformers import AutoModelForCausalLM

    if "output_loading_info" in options:
        raise InvalidInputError("output_loading_info: posenc returns the model alone. Leave it out.")
    anything_goes = options.pop("ignore_mismatched_sizes", False)
    name = called or source
    with explained(source, called=name):
        model, info = AutoModelForCausalLM.from_pretrained(
            source, **options, ignore_mismatched_sizes=True, output_loading_info=True
        )
    if not anything_goes:
        _check_complete(name, info)
    if info["unexpected_keys"]:
        logger.warning(
            "%s: %d tensors of its weights have no place in the model that its config.json describes (%s)",
            name,
            len(info["unexpected_keys"]),
            _some(info["unexpected_keys"]),
        )
    return model


def load_tokenizer(source: str, *, called: str | None = None) -> Any:
    """Load the tokenizer of a checkpoint.

    Parameters
    ----------
    source : str
        Folder or hub name.
    called : str, optional
        The checkpoint's name in messages, by default ``source``.

    Raises
    ------
    InvalidInputError
        If it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with explained(source, called=called or source, what="its tokenizer"):
        return AutoTokenizer.from_pretrained(source)


@contextmanager
def explained(source: str, *, called: str, what: str = "it") -> Iterator[None]:
    """Turn what transformers raises on ``source`` inside the block into one message with the cause.

    Parameters
    ----------
    source : str
        Folder or hub name.
    called : str
        Its name in messages.
    what : str
        What is loaded, as in ``transformers cannot load {what}``.

    Raises
    ------
    InvalidInputError
        In place of every exception that is not a :class:`~posenc.errors.PosencError`.
    """
    try:
        yield
    except PosencError:
        raise
    except Exception as error:  # JSON, pickle and safetensors parsers and config checks raise errors of many types
        cause, file_damage = first_line(error), damage(source)
        reason = cause if file_damage is None else f"{cause.rstrip('.')}. {file_damage}"
        raise InvalidInputError(f"{called}: transformers cannot load {what}: {reason}") from error


def damage(source: str) -> str | None:
    """Describe what is wrong with the files of a model folder, judged by their first bytes, or return None."""
    folder = Path(source)
    if not folder.is_dir():
        return None
    for file in sorted(file for file in folder.iterdir() if file.is_file()):
        try:
            with file.open("rb") as content:
                start = content.read(len(LFS_POINTER))
        except OSError as error:
            return f"{file.name} cannot be read ({error.strerror or error})."
        if start == LFS_POINTER:
            return f"{file.name} is a Git LFS pointer, not the file itself. Run 'git lfs pull' in the folder."
        if file.suffix == ".safetensors" and (reason := _unreadable(file)):
            return f"{file.name} is damaged or not complete ({reason}). Download it again."
    return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, with the type of the error if the message alone says little."""
    line = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, OSError | ValueError | RuntimeError) and line:
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _unreadable(file: Path) -> str | None:
    """Return why a safetensors file cannot be opened, or None."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            return None
    except SafetensorError as error:
        return first_line(error).removeprefix("SafetensorError: ")


def _check_complete(name: str, info: dict[str, Any]) -> None:
    if info["mismatched_keys"]:
        tensor, in_file, in_model = min(info["mismatched_keys"])
        raise InvalidInputError(
            f"{name}: {len(info['mismatched_keys'])} of its tensors do not fit its config.json, such as {tensor}: "
            f"{list(in_file)} in the file, {list(in_model)} in the model. Use the config.json of these weights."
        )
    if info["missing_keys"]:
        raise InvalidInputError(
            f"{name}: its weights lack {len(info['missing_keys'])} of the model's tensors "
            f"({_some(info['missing_keys'])}), which transformers would fill with random numbers. Use all files of "
            "the checkpoint, and its own config.json."
        )


def _some(names: Any) -> str:
    shown = sorted(names)
    return ", ".join(shown[:NAMED]) + (", ..." if len(shown) > NAMED else "")


def unpack_gguf(source: Path, folder: Path) -> None:
    """Convert a GGUF file to a folder that ``from_pretrained`` reads, in float32.

    Parameters
    ----------
    source : Path
        The GGUF file.
    folder : Path
        Existing folder to which configuration, tokenizer and weights are written.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
    tokenizer.save_pretrained(folder)
    # save_pretrained refuses a model that came from GGUF, so configuration and weights are written here
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
