"""The files of a sweep: one sweep file, and the samples of every cell.

In a results folder the sweep file (``sweep.json``) lists the cells, and each cell's samples are in a file of their
own; a bundle is one file that holds both. Nothing in them depends on when or how fast something ran, so measuring
again writes the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from posenc.errors import InvalidInputError
from posenc.evaluate.cells import Model, cell_id, read_json, validated
from posenc.evaluate.tasks.base import Sample
from posenc.files import plain, replacing
from posenc.params import StrictModel

FORMAT, CELL_FORMAT = "posenc-eval", "posenc-eval-cell"
VERSION = 1
"""Rises when the files of one version cannot be read as those of another."""
DECIMALS = 6
"""Of a stored score: finer than any standard error, coarser than rounding noise."""
DIGITS = 20
"""Hexadecimal digits of a cell's id."""


def identify(identity: dict[str, Any]) -> str:
    """The id of a cell: a hash of everything that determines its result, including the version of the files."""
    return cell_id({"version": VERSION, **identity}, DIGITS)


class CellResult(StrictModel):
    """The file of one cell."""

    format: Literal["posenc-eval-cell"] = "posenc-eval-cell"
    version: Literal[1] = 1
    id: str
    identity: dict[str, Any]
    samples: tuple[Sample, ...]


class SweepEntry(StrictModel):
    """One cell as the sweep file lists it.

    Parameters
    ----------
    id : str
        Hash of ``identity``.
    label : str
        The strategy's name in tables.
    task : str
        The task's name in tables.
    metric : str
        ``"loss"`` (nats per token) or ``"accuracy"``.
    length, seed : int
    identity : dict
        Everything that determines the result.
    against : str, optional
        Label of the strategy that the report compares it with.
    samples : tuple of Sample, optional
        In bundles only; None if the cell is not measured yet.
    """

    id: str
    label: str
    task: str
    metric: Literal["loss", "accuracy"]
    length: int
    seed: int
    identity: dict[str, Any]
    against: str | None = None
    samples: tuple[Sample, ...] | None = None


class Sweep(StrictModel):
    """A sweep file."""

    format: Literal["posenc-eval"] = "posenc-eval"
    version: Literal[1] = 1
    name: str
    command: str
    model: str
    window: int | None
    versions: dict[str, str]
    cells: tuple[SweepEntry, ...]

    @property
    def missing(self) -> int:
        """Cells without samples."""
        return sum(cell.samples is None for cell in self.cells)


def rounded(samples: list[Sample]) -> tuple[Sample, ...]:
    """Samples as they are stored: scores are rounded, and one that is not a number becomes None."""
    scores = plain([sample.score for sample in samples])
    return tuple(
        sample.model_copy(update={"score": None if score is None else round(score, DECIMALS)})
        for sample, score in zip(samples, scores, strict=True)
    )


def read_checked(path: Path, model: type[Model], expected: str) -> Model:
    """Read a JSON file of one of the models above; `expected` is its ``format``.

    Raises
    ------
    InvalidInputError
        If it cannot be read, is something else, or was written by another version.
    """
    data = read_json(path, command="posenc eval")
    if not isinstance(data, dict) or data.get("format") != expected:
        raise InvalidInputError(f"{path}: not a result of posenc eval (its 'format' is not {expected!r}).")
    if data.get("version") != VERSION:
        raise InvalidInputError(
            f"{path}: written by another version of posenc (results version {data.get('version')!r}, this one reads "
            f"and writes {VERSION}). Choose another folder with --out, or use the posenc that wrote it."
        )
    return validated(data, model, path)


def write_sweep(sweep: Sweep, path: Path) -> Path:
    """Write a sweep file or a bundle with one line per cell, whole or not at all."""
    data = plain(sweep.model_dump(exclude_none=True))
    cells = data.pop("cells")
    head = json.dumps(data, indent=1, ensure_ascii=False)
    lines = ",\n".join("  " + json.dumps(cell, ensure_ascii=False) for cell in cells)
    body = f"{head[:-2]},\n" + f' "cells": [\n{lines}\n ]\n}}\n'
    with replacing(path) as temporary:
        temporary.write_text(body, encoding="utf-8")
    return path


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file, or a bundle with its samples."""
    return read_checked(path, Sweep, FORMAT)


def read_cell(path: Path) -> CellResult:
    """Read the file of one cell."""
    return read_checked(path, CellResult, CELL_FORMAT)
