"""Measured cells on disk: one JSON file each, named by a hash of everything that determines what is in it.

A file appears whole or not at all. So a run that was killed continues where it stopped, and a folder can be used again
with other settings: cells that do not belong to them are never asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from posenc.errors import InvalidInputError
from posenc.files import plain, replacing

Content = TypeVar("Content")
Model = TypeVar("Model", bound=BaseModel)


def cell_id(identity: Mapping[str, Any], digits: int) -> str:
    """The name of a cell: the first digits of a hash of everything that determines its content."""
    text = json.dumps(plain(dict(identity)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


class CellStore(Generic[Content]):
    """A folder of cells.

    Parameters
    ----------
    folder : Path
        It must exist before a cell is written.
    reader : callable
        Reads and checks the file of a cell; InvalidInputError where it is damaged.
    """

    def __init__(self, folder: Path, reader: Callable[[Path], Content]) -> None:
        self.folder, self._reader = folder, reader

    def file(self, identifier: str) -> Path:
        """Where a cell is kept."""
        return self.folder / f"{identifier}.json"

    def read(self, identifier: str) -> Content | None:
        """What a cell holds, or None if it is not measured yet.

        Raises
        ------
        InvalidInputError
            If its file is damaged or cannot be read.
        """
        file = self.file(identifier)
        return self._reader(file) if file.is_file() else None

    def write(self, identifier: str, content: str) -> None:
        """Keep a cell, in place of what it held before.

        Raises
        ------
        InvalidInputError
            If it cannot be written; what was there before stays.
        """
        with replacing(self.file(identifier)) as temporary:
            temporary.write_text(content, encoding="utf-8")

    def clear_drafts(self) -> None:
        """Remove the unfinished files of a killed run. Nobody else may be writing."""
        clear_drafts(self.folder)


def clear_drafts(folder: Path) -> None:
    """Remove unfinished JSON files from a folder."""
    for draft in folder.glob(".*.json"):
        draft.unlink(missing_ok=True)


def read_json(path: Path, *, command: str) -> Any:
    """The content of a JSON file that a command of posenc wrote.

    Raises
    ------
    InvalidInputError
        If it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except ValueError:
        raise InvalidInputError(f"{path}: not a result of {command} (not JSON). Remove it and measure again.") from None


def validated(data: Any, model: type[Model], path: Path) -> Model:
    """The content of a result file as a model.

    Raises
    ------
    InvalidInputError
        If something in it is missing or wrong.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        reason = f"{where}: {first['msg']}" if where else first["msg"]
        raise InvalidInputError(f"{path}: damaged result ({reason}). Remove it and measure again.") from None
