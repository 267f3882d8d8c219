"""Retrieval of planted random spans, for models that follow no words: see :mod:`posenc.evaluate.retrieval`."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from posenc.errors import InvalidInputError
from posenc.evaluate import retrieval
from posenc.evaluate.shared_prefill import SharedPrefill
from posenc.evaluate.tasks.base import Sample, Source, Subject, Task
from posenc.evaluate.tasks.depths import Depths


class Spans(Task):
    """A random span at every depth of a document, each asked for by its first tokens after one prefill."""

    kind: ClassVar[str] = "spans"

    documents: int = Field(8, ge=1)
    depths: Depths = retrieval.DEPTHS

    def check(self, source: Source, length: int, seed: int) -> None:
        source.require(length, f"{self.kind} at {length} tokens")
        self.places(length)

    def places(self, length: int) -> list[int]:
        """First token of the span of every depth; spans at depths close to each other are moved apart.

        Raises
        ------
        InvalidInputError
            If they do not fit.
        """
        size = retrieval.SPAN
        starts = [retrieval.span_start(length, size, depth) for depth in self.depths]
        free = 0
        for number in np.argsort(self.depths):
            starts[number] = max(starts[number], free)
            free = starts[number] + size
        if free > length - size:
            raise InvalidInputError(
                f"{self.kind}: {length} tokens have no room for spans of {size} tokens at depths "
                f"{', '.join(f'{depth:g}' for depth in self.depths)}. Give fewer depths or longer lengths."
            )
        return starts

    def prompts(self, source: Source, length: int, seed: int, document: int) -> NDArray[np.int64]:
        """int64 [D, length]: one prompt per depth, alike but for the span repeated at the end."""
        rng = np.random.default_rng([seed, document])
        start = int(rng.integers(len(source.tokens) - length + 1))
        context = source.tokens[start : start + length].copy()
        drawn_from = retrieval.random_tokens(source.tokenizer)
        spans = [rng.choice(drawn_from, retrieval.SPAN) for _ in self.depths]
        for at, span in zip(self.places(length), spans, strict=True):
            context[at : at + retrieval.SPAN] = span
        prompts = np.tile(context, (len(spans), 1))
        prompts[:, -retrieval.SPAN :] = spans
        return prompts

    def measure(self, subject: Subject, source: Source, length: int, seed: int) -> list[Sample]:
        asked = retrieval.SPAN - retrieval.HINT
        samples = []
        for document in range(self.documents):
            reader = SharedPrefill(subject.loaded.model, subject.handle)
            for depth, prompt in zip(self.depths, self.prompts(source, length, seed, document), strict=True):
                guessed = reader.read(prompt, asked + 1)[:-1].argmax(-1).cpu().numpy()
                right = float((guessed == prompt[-asked:]).mean())
                samples.append(Sample(document=document, depth=depth, score=right))
        return samples
