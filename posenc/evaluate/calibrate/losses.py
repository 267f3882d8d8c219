"""The loss of every document under every candidate, measured once and kept in a folder.

A cell is named by a hash of everything its numbers depend on: model, documents, length, versions and the plan itself.
So candidates with the same plan (every one that is inactive at a length, say) share one cell.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from posenc.errors import InvalidInputError
from posenc.evaluate.calibrate.corpus import Corpus
from posenc.evaluate.calibrate.search import Candidate
from posenc.evaluate.cells import CellStore, cell_id, read_json, validated
from posenc.evaluate.models import Loaded
from posenc.evaluate.perplexity import Mean
from posenc.evaluate.tasks.base import Subject
from posenc.evaluate.tasks.prose import document_losses
from posenc.params import Fingerprint, StrictModel
from posenc.positions import PositionStrategy
from posenc.trace import quiet, versions

FORMAT = 1
DIGITS = 24
"""Of a cell's name."""


class LossCell(StrictModel):
    """The file of one cell.

    Parameters
    ----------
    candidate : str
        The first candidate with this plan, for readers.
    length : int
        Tokens of each document.
    losses : tuple of float
        Of the first documents, in nats per token.
    """

    candidate: str
    length: int
    losses: tuple[Annotated[float, Field(strict=True, allow_inf_nan=False)], ...]


@dataclass
class DocumentLosses:
    """Measures losses, or reads what was measured before.

    Parameters
    ----------
    loaded : Loaded
        The model.
    fingerprint : Fingerprint
        Of that model.
    corpus : Corpus
        The documents.
    scored : int
        Tokens scored at the end of each.
    folder : Path
        An existing folder; one file per cell.
    step : callable
        Called with a description and a number of tokens that are done.
    """

    loaded: Loaded
    fingerprint: Fingerprint
    corpus: Corpus
    scored: int
    folder: Path
    step: Callable[[str, int], None] = lambda description, tokens: None
    _cells: dict[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._store = CellStore(self.folder, _read_cell)
        self._shared_identity = {
            "format": FORMAT,
            "model": self.fingerprint.model_dump(),
            "dtype": self.loaded.dtype,
            "documents": self.corpus.sha256,
            "scored": self.scored,
            "versions": versions(),
        }

    def of(self, candidate: Candidate, length: int, count: int, *, before: int = 0) -> Mean:
        """Loss of each of the first `count` documents, in nats per token.

        Parameters
        ----------
        before : int
            Documents that an earlier call has reported as done.

        Raises
        ------
        InvalidInputError
            If the file of a cell is damaged or cannot be written, or a loss is not finite.
        """
        key = self.key(candidate, length)
        losses = self._read(key)
        self.skip(candidate, length, min(len(losses), count) - before)
        if len(losses) < count:
            losses = (*losses, *self._measure(candidate, length, len(losses), count))
            self._write(key, candidate, length, losses)
        return Mean(losses[:count])

    def skip(self, candidate: Candidate, length: int, documents: int) -> None:
        """Report documents as done that need not be measured."""
        if documents > 0:
            self.step(f"{candidate} at {length}", documents * length)

    def key(self, candidate: Candidate, length: int) -> str:
        """Name of a cell."""
        identity = {**self._shared_identity, "length": length, "plan": plan_digest(candidate.strategy, length)}
        return cell_id(identity, DIGITS)

    def _measure(self, candidate: Candidate, length: int, start: int, stop: int) -> tuple[float, ...]:
        documents = self.corpus.documents[start:stop]
        losses: tuple[float, ...] = ()
        with quiet(), Subject.under(self.loaded, candidate.strategy):  # bad candidates are tried on purpose
            for loss in document_losses(self.loaded.model, documents, length, self.scored):
                losses = (*losses, loss)
                self.skip(candidate, length, 1)
        if not all(map(math.isfinite, losses)):
            raise InvalidInputError(
                f"{candidate} at {length} tokens: the model's loss is not a finite number. Its weights or its dtype "
                "cannot compute this; a half-precision model may need float32."
            )
        return losses

    def _read(self, key: str) -> tuple[float, ...]:
        """The losses that a cell holds so far."""
        if key not in self._cells:
            cell = self._store.read(key)
            self._cells[key] = () if cell is None else cell.losses
        return self._cells[key]

    def _write(self, key: str, candidate: Candidate, length: int, losses: tuple[float, ...]) -> None:
        cell = LossCell(candidate=str(candidate), length=length, losses=losses)
        self._store.write(key, json.dumps(cell.model_dump()) + "\n")
        self._cells[key] = losses


def plan_digest(strategy: PositionStrategy, length: int) -> str:
    """Hash of the positions and frequencies of a prompt; equal for equal plans, whichever strategy made them."""
    plan = strategy.plan(length)
    digest = hashlib.sha256()
    if strategy.capabilities.changes_frequencies:
        described = {**strategy.describe(), "window": strategy.window}
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    if not plan.is_identity:
        for segment in plan.segments:
            for array in (segment.key_start, segment.key_stop, segment.query_positions, segment.key_positions):
                digest.update(f"{array.dtype}{array.shape}".encode())
                digest.update(array.tobytes())
        if plan.query_scale is not None:
            digest.update(plan.query_scale.tobytes())
    return digest.hexdigest()


def _read_cell(path: Path) -> LossCell:
    return validated(read_json(path, command="posenc calibrate"), LossCell, path)
