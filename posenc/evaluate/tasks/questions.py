"""Tasks that ask in words: a long context, one or more questions about it, answers as text.

Prompts are put together from pieces that are tokenized one by one, so their size is exact for any tokenizer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posenc.errors import InvalidInputError
from posenc.evaluate.shared_prefill import SharedPrefill
from posenc.evaluate.tasks.base import Sample, Source, Subject, Task

SPARE_TOKENS = 8
"""New tokens beyond those of the expected answer."""


@dataclass(frozen=True)
class Reference:
    """A piece of text that the answer must hold, and the depth at which the context holds it."""

    text: str
    depth: float | None = None


@dataclass(frozen=True)
class Question:
    """A whole prompt, and the pieces that its answer must hold.

    Parameters
    ----------
    prompt : int64 [P]
    references : tuple of Reference
    new_tokens : int
        Most tokens of an answer.
    """

    prompt: NDArray[np.int64]
    references: tuple[Reference, ...]
    new_tokens: int


class QuestionTask(Task):
    """A task that asks in words; answers are decoded greedily and scored per reference.

    The default score is "string match (all)" of RULER (Hsieh et al. 2024, arXiv 2404.06654): the mean over the
    references is the share of them that the answer holds.
    """

    @abstractmethod
    def questions(self, source: Source, length: int, rng: np.random.Generator) -> list[Question]:
        """The questions about one document, all prompts of one length."""

    def score(self, reference: Reference, answer: str) -> float:
        """1 if the answer holds the reference, in upper or lower case, else 0."""
        return float(reference.text.lower() in answer.lower())

    def random(self, length: int, seed: int, document: int) -> np.random.Generator:
        """The random generator of a document and its questions."""
        return np.random.default_rng([seed, document])

    def check(self, source: Source, length: int, seed: int) -> None:
        self.questions(source, length, self.random(length, seed, 0))

    def measure(self, subject: Subject, source: Source, length: int, seed: int) -> Iterator[Sample]:
        for document in range(self.documents):
            reader = SharedPrefill(subject.loaded.model, subject.handle)
            for question in self.questions(source, length, self.random(length, seed, document)):
                tokens = reader.answer(question.prompt, question.new_tokens)
                answer: str = source.tokenizer.decode(tokens, skip_special_tokens=True)
                for reference in question.references:
                    yield Sample(
                        document=document,
                        depth=reference.depth,
                        score=self.score(reference, answer),
                        expected=reference.text,
                        answer=answer,
                    )


def room_for(source: Source, references: Sequence[Reference]) -> int:
    """New tokens that an answer with these references may need."""
    answer = ", ".join(reference.text for reference in references)
    return len(source.encode(f" {answer}.")) + SPARE_TOKENS


def hide(
    source: Source,
    length: int,
    rng: np.random.Generator,
    *,
    what: str,
    needles: Sequence[tuple[float, str]],
    questions: Sequence[str],
    head: str = "",
) -> list[NDArray[np.int64]]:
    """Hide needles in prose: one prompt of exactly `length` tokens per question, alike up to the question.

    Parameters
    ----------
    what : str
        Name of the task, for messages.
    needles : sequence of (depth, text)
        Needles of one depth stay in this order.
    questions : sequence of str
        Each ends one prompt; a shorter question is preceded by more prose.
    head : str
        Begins every prompt.

    Raises
    ------
    InvalidInputError
        If the length has no room for needles and question, or the text is too short to fill it.
    """
    begin = source.encode(head) if head else np.empty(0, dtype=np.int64)
    hidden = [(depth, source.encode(text)) for depth, text in needles]
    ends = [source.encode(question) for question in questions]
    fixed = len(begin) + sum(len(tokens) for _, tokens in hidden)
    rooms = [length - fixed - len(end) for end in ends]
    if min(rooms) < 1:
        raise InvalidInputError(
            f"{what}: {length} tokens have no room for its sentences. Give at least {length - min(rooms) + 1}."
        )
    source.require(max(rooms), f"{what} at {length} tokens")
    start = int(rng.integers(0, len(source.tokens) - max(rooms) + 1))
    prose = source.tokens[start : start + max(rooms)]
    pieces, position = [begin], 0
    for depth, tokens in sorted(hidden, key=lambda needle: needle[0]):
        cut = int(depth * min(rooms))
        pieces += [prose[position:cut], tokens]
        position = cut
    context = np.concatenate([*pieces, prose[position : min(rooms)]])
    return [np.concatenate([context, prose[min(rooms) : room], end]) for room, end in zip(rooms, ends, strict=True)]
