"""Write a file completely or not at all, read YAML, and turn results into plain data."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from posenc.errors import InvalidConfigError, InvalidInputError


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path in which ``~`` and ``~name`` are replaced by home folders.

    Raises
    ------
    InvalidInputError
        If there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InvalidInputError(f"{path}: there is no such home folder here. Write the path without '~'.") from None


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and its parents, and check that files can be written into it.

    Raises
    ------
    InvalidInputError
        If it cannot be made or written.
    """
    folder = expanded(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidInputError(f"{folder}: cannot be written ({error.strerror or error}).") from None
    return folder


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, and move it to `path` when the block ends without an error.

    Raises
    ------
    InvalidInputError
        If the file cannot be written; an existing file at `path` then stays as it was.
    """
    target = expanded(path)
    temporary = None
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        _flush(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise InvalidInputError(f"{target}: cannot be written ({error.strerror or error}).") from None
    finally:
        if temporary is not None:
            with suppress(FileNotFoundError):
                temporary.unlink()


def _flush(path: Path) -> None:
    """Write the content to disk before the file is renamed, so that a power cut cannot leave an empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(data: Any, path: str | Path, *, indent: int = 1) -> Path:
    """Write plain data as strict JSON (NaN and infinities become null), whole or not at all; returns the file.

    Raises
    ------
    InvalidInputError
        If it cannot be written.
    """
    target = expanded(path)
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(plain(data), indent=indent, allow_nan=False) + "\n", encoding="utf-8")
    return target


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML file; raises InvalidConfigError if it cannot be read or parsed."""
    import yaml  # costs the command line its start

    file = expanded(path)
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidConfigError(f"{file}: cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError:
        raise InvalidConfigError(f"{file}: is not UTF-8 text, so not a YAML file.") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidConfigError(f"{file}: is not valid YAML: {' '.join(str(error).split())}") from None


def plain(data: Any) -> Any:
    """The data for JSON: NaN and infinities become None, numpy values become numbers and lists."""
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if hasattr(data, "tolist"):
        return plain(data.tolist())
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if data is None or isinstance(data, str | int | float):
        return data
    return str(data)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
