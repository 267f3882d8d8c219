"""The losses of every document, kept in a folder, so that a killed run goes on where it stopped.

A cell is named by a hash of everything its numbers depend on: model, documents, length, versions and the plan
itself. So candidates with the same plan (every one that is inactive at a length, say) share one cell, and
a folder can be used again with other settings: what does not belong is not found.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posenc.errors import InvalidInputError
from posenc.evaluate.calibrate.corpus import Corpus
from posenc.evaluate.calibrate.search import Candidate
from posenc.evaluate.models import Loaded
from posenc.evaluate.perplexity import Mean, measure
from posenc.files import replacing
from posenc.params import Fingerprint
from posenc.positions import PositionStrategy
from posenc.trace import quiet, versions

FORMAT = 1


@dataclass
class Cells:
    """Scores documents, or reads what was scored before.

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
    _known: dict[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._same = {
            "format": FORMAT,
            "model": self.fingerprint.model_dump(),
            "dtype": self.loaded.dtype,
            "documents": self.corpus.sha256,
            "scored": self.scored,
            "versions": versions(),
        }

    def losses(self, candidate: Candidate, length: int, count: int, *, before: int = 0) -> Mean:
        """Loss of each of the first `count` documents, in nats per token; `before` of them were asked for already.

        Raises
        ------
        InvalidInputError
            If a cell's file is damaged or cannot be written, or a loss is not finite.
        """
        key = self.key(candidate, length)
        known = self.known(key)
        self.skip(candidate, length, min(len(known), count) - before)
        if len(known) < count:
            known = (*known, *self._measure(candidate, length, len(known), count))
            self._save(key, candidate, length, known)
        return Mean(known[:count])

    def skip(self, candidate: Candidate, length: int, documents: int) -> None:
        """Report documents as done that need not be scored."""
        if documents > 0:
            self.step(f"{candidate} at {length}", documents * length)

    def known(self, key: str) -> tuple[float, ...]:
        """The losses a cell holds so far."""
        if key not in self._known:
            self._known[key] = self._read(key)
        return self._known[key]

    def key(self, candidate: Candidate, length: int) -> str:
        """Name of a cell."""
        data = {**self._same, "length": length, "plan": plan_digest(candidate.made, length)}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:24]

    def _measure(self, candidate: Candidate, length: int, start: int, stop: int) -> tuple[float, ...]:
        from posenc.hf.apply import apply

        documents = self.corpus.documents[start:stop]
        with quiet(), self.loaded.threads(), apply(self.loaded.model, candidate.made):  # bad ones are tried on purpose
            found = measure(
                self.loaded.model, documents, length, self.scored, lambda _: self.skip(candidate, length, 1)
            )
        losses = found.losses.values
        if not all(map(math.isfinite, losses)):
            raise InvalidInputError(
                f"{candidate} at {length} tokens: the model's loss is not a finite number. Its weights or its dtype "
                "cannot compute this; a half-precision model may need float32."
            )
        return losses

    def _read(self, key: str) -> tuple[float, ...]:
        path = self.folder / f"{key}.json"
        try:
            losses = json.loads(path.read_text(encoding="utf-8"))["losses"]
            if not (isinstance(losses, list) and all(isinstance(x, float) and math.isfinite(x) for x in losses)):
                raise TypeError
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise InvalidInputError(f"{path}: cannot be read ({error.strerror or error}).") from None
        except (ValueError, KeyError, TypeError):
            raise InvalidInputError(
                f"{path}: damaged, or not a cell of posenc calibrate. Remove it and run again: "
                "only this cell is measured again."
            ) from None
        return tuple(losses)

    def _save(self, key: str, candidate: Candidate, length: int, losses: tuple[float, ...]) -> None:
        data: dict[str, Any] = {"candidate": str(candidate), "length": length, "losses": list(losses)}
        with replacing(self.folder / f"{key}.json") as temporary:
            temporary.write_text(json.dumps(data) + "\n", encoding="utf-8")
        self._known[key] = losses


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
