"""Retrieval of planted random spans: can the model copy what it cannot guess from far back?

A span of random tokens is planted into prose. The input ends with the span's first tokens, and the model must
continue it. This measures models that follow no words; for others see :mod:`posenc.evaluate.tasks.passkey`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from posenc.errors import InvalidInputError
from posenc.evaluate.shared_prefill import SharedPrefill
from posenc.evaluate.tasks.base import Sample, Source, Subject, Task
from posenc.evaluate.tasks.depths import Depths
from posenc.evaluate.tasks.documents import spread

SPAN = 12
"""Tokens of a span."""
HINT = 3
"""Tokens of the span that the input ends with; the others must be retrieved."""
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


class _PlantedSpans(Task):
    """Share of the span's tokens after the hint that are the model's first guess, by teacher forcing."""

    depths: Depths = DEPTHS

    @abstractmethod
    def prompts(self, source: Source, length: int, seed: int) -> Iterator[tuple[Sequence[float], NDArray[np.int64]]]:
        """Per document the depths, and one prompt for each, int64 [D, length]."""

    def measure(self, subject: Subject, source: Source, length: int, seed: int) -> Iterator[Sample]:
        retrieved = SPAN - HINT
        for document, (depths, prompts) in enumerate(self.prompts(source, length, seed)):
            reader = SharedPrefill(subject.loaded.model, subject.handle)
            for depth, prompt in zip(depths, prompts, strict=True):
                guesses = reader.read(prompt, retrieved + 1)[:-1].argmax(-1).cpu().numpy()
                share = float(np.mean(guesses == prompt[-retrieved:], dtype=np.float32))  # float32 as results have it
                yield Sample(document=document, depth=depth, score=share)

    def places(self, length: int, depths: Sequence[float]) -> list[int]:
        """First token of the span at each depth; spans that would overlap are moved apart.

        Raises
        ------
        InvalidInputError
            If they do not fit.
        """
        starts = [int(depth * (length - 2 * SPAN)) for depth in depths]
        free = 0
        for number in np.argsort(depths):
            starts[number] = max(starts[number], free)
            free = starts[number] + SPAN
        if free > length - SPAN:
            raise InvalidInputError(
                f"{self.name}: {length} tokens have no room for spans of {SPAN} tokens at depths "
                f"{', '.join(f'{depth:g}' for depth in depths)}. Give fewer depths or longer lengths."
            )
        return starts


class Spans(_PlantedSpans):
    """A random span at every depth of a document; all are asked for after one prefill."""

    name: ClassVar[str] = "spans"
    summary: ClassVar[str] = "continue a random span planted at every depth"

    documents: int = Field(8, ge=1)

    def check(self, source: Source, length: int, seed: int) -> None:
        source.require(length, f"{self.name} at {length} tokens")
        self.places(length, self.depths)

    def prompts(self, source: Source, length: int, seed: int) -> Iterator[tuple[Sequence[float], NDArray[np.int64]]]:
        starts, tokens = self.places(length, self.depths), random_tokens(source.tokenizer)
        for document in range(self.documents):
            rng = np.random.default_rng([seed, document])
            first = int(rng.integers(len(source.tokens) - length + 1))
            spans = [rng.choice(tokens, SPAN) for _ in self.depths]
            yield self.depths, plant(source.tokens[first : first + length], spans, starts)


class SingleSpan(_PlantedSpans):
    """One random span per document, the depths taking turns; this is the retrieval of ``posenc demo``.

    The documents are spread evenly over the text. Every length of a suite reads the ends of the same documents and is
    asked for the same spans: `longest` is the length of the longest input, and `apart` the least distance between the
    ends of two documents.
    """

    name: ClassVar[str] = "single_span"
    summary: ClassVar[str] = "continue one random span per document, the depths taking turns"
    unnamed: ClassVar[frozenset[str]] = frozenset({"documents", "longest"})

    documents: int = Field(40, ge=1)
    apart: PositiveInt = 128
    longest: PositiveInt | None = None

    def fitted(self, lengths: Sequence[int]) -> SingleSpan:
        return self if self.longest is not None else self.model_copy(update={"longest": max(lengths)})

    def check(self, source: Source, length: int, seed: int) -> None:
        self.cut(source, length, seed)
        for depth in self.depths:
            self.places(length, [depth])

    def cut(self, source: Source, length: int, seed: int) -> NDArray[np.int64]:
        """The documents before anything is planted, int64 [N, max(longest, length)]."""
        return spread(source, max(length, self.longest or 0), self.documents, apart=self.apart, seed=seed)

    def prompts(self, source: Source, length: int, seed: int) -> Iterator[tuple[Sequence[float], NDArray[np.int64]]]:
        tokens = random_tokens(source.tokenizer)
        for document, context in enumerate(self.cut(source, length, seed)):
            depths = [self.depths[document % len(self.depths)]]
            span = np.random.default_rng([seed, document]).choice(tokens, SPAN)
            yield depths, plant(context[-length:], [span], self.places(length, depths))


def plant(context: NDArray[np.int64], spans: Sequence[NDArray[np.int64]], starts: Sequence[int]) -> NDArray[np.int64]:
    """Overwrite parts of a context with spans: one prompt per span, which ends with that span again.

    Parameters
    ----------
    context : int64 [L]
        Prose; it is not changed.
    spans : sequence of int64 [S]
    starts : sequence of int
        Where each span is planted.

    Returns
    -------
    int64 [N, L]
        Alike but for the last S tokens.
    """
    planted = context.copy()
    for start, span in zip(starts, spans, strict=True):
        planted[start : start + len(span)] = span
    prompts = np.tile(planted, (len(spans), 1))
    prompts[:, -len(spans[0]) :] = spans
    return prompts


def random_tokens(tokenizer: Any) -> NDArray[np.int64]:
    """The token ids that spans are drawn from: all but the special ones."""
    return np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids).astype(np.int64)
