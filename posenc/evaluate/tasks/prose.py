"""Sliding perplexity: how well a model predicts text that it reads through a window of a given length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from posenc.evaluate import perplexity
from posenc.evaluate.tasks.base import Sample, Source, Subject, Task
from posenc.evaluate.texts import cut_documents


class Perplexity(Task):
    """Loss of the last `scored` tokens of windows of text.

    The windows slide over the text so that no token is scored twice; `documents` of them, evenly spread, are
    read. Every length of a suite scores the same tokens: `longest` is the room kept before them.
    """

    kind: ClassVar[str] = "perplexity"
    metric: ClassVar[Literal["loss", "accuracy"]] = "loss"
    unnamed: ClassVar[frozenset[str]] = frozenset({"documents", "longest"})

    documents: PositiveInt = 32
    scored: PositiveInt = perplexity.DEFAULT_SCORED
    longest: PositiveInt | None = None

    def fitted(self, lengths: Sequence[int]) -> Perplexity:
        return self if self.longest is not None else self.model_copy(update={"longest": max(lengths)})

    def check(self, source: Source, length: int, seed: int) -> None:
        perplexity.check_lengths([length], self.scored)
        self.cut(source, length, seed)

    def cut(self, source: Source, length: int, seed: int) -> NDArray[np.int64]:
        """int64 [N, max(longest, length)]; other seeds than 0 start somewhere else in the text."""
        longest = max(length, self.longest or 0)
        tokens = source.tokens
        spare = max(0, len(tokens) - longest) // self.documents
        start = int(np.random.default_rng(seed).integers(spare)) if seed and spare else 0
        return cut_documents(tokens[start:], longest, self.documents, step=self.scored, name=source.text.name)

    def measure(self, subject: Subject, source: Source, length: int, seed: int) -> list[Sample]:
        documents = self.cut(source, length, seed)
        measured = perplexity.measure(subject.loaded.model, documents, length, self.scored)
        return [Sample(document=number, score=loss) for number, loss in enumerate(measured.losses.values)]
