"""Common and frequent words (RULER, Hsieh et al. 2024, arXiv 2404.06654): aggregate over the whole context.

Both fill the length with words, to within one word.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from posenc.errors import InvalidInputError
from posenc.evaluate.tasks.base import Source
from posenc.evaluate.tasks.questions import Question, QuestionTask, Reference, room_for
from posenc.evaluate.tasks.words import letters, made_up

COMMON_HEAD = "Below is a numbered list of words. Some words come more often than the others. Remember them.\n"
COMMON_QUESTION = "\n\nWhich {count} words are the most common in the list above? The {count} most common words are:"
FREQUENT_HEAD = "Below is a coded text. Count how often each code word comes, and pass over the dots '....'.\n"
FREQUENT_QUESTION = (
    "\n\nWhich {count} code words come most often in the text above? The {count} most frequent code words are:"
)
CODE = 6


class CommonWords(QuestionTask):
    """A shuffled list: `common` words occur `often` times each, and as many others as fit occur `seldom` times."""

    name: ClassVar[str] = "common_words"
    summary: ClassVar[str] = "the words that come most often in a list (RULER)"

    common: PositiveInt = 10
    often: PositiveInt = 30
    seldom: PositiveInt = 3

    def check(self, source: Source, length: int, seed: int) -> None:
        if self.often <= self.seldom:
            raise InvalidInputError(f"{self.name}: often ({self.often}) must be more than seldom ({self.seldom}).")
        super().check(source, length, seed)

    def questions(self, source: Source, length: int, rng: np.random.Generator) -> list[Question]:
        most = self.common + length // self.seldom  # a word takes at least one token
        words = made_up(rng, most)
        chosen, others = words[: self.common], words[self.common :]
        head, end = source.encode(COMMON_HEAD), source.encode(COMMON_QUESTION.format(count=self.common))
        room = length - len(head) - len(end)
        items = [word for word in chosen for _ in range(self.often)]
        needed = _numbers_size(source, 0, len(items)) + self.often * sum(_size(source, word) for word in chosen)
        if needed > room:
            raise InvalidInputError(
                f"{self.name}: {length} tokens have no room for {self.common} words that come {self.often} times. "
                f"Give fewer of either, or at least {length + needed - room} tokens."
            )
        for word in others:
            needed += _numbers_size(source, len(items), self.seldom) + self.seldom * _size(source, word)
            if needed > room:
                break
            items += [word] * self.seldom
        shuffled = [items[at] for at in rng.permutation(len(items))]
        listed = [
            tokens
            for number, word in enumerate(shuffled, 1)
            for tokens in (source.encode(f"\n{number}."), source.encode(f" {word}"))
        ]
        references = tuple(Reference(word) for word in chosen)
        prompt = np.concatenate([head, *listed, end])
        return [Question(prompt, references, room_for(source, references))]


class FrequentWords(QuestionTask):
    """Code words of a Zeta distribution: the most frequent is noise; the next `asked` are asked for."""

    name: ClassVar[str] = "frequent_words"
    summary: ClassVar[str] = "the most frequent words of a Zeta distribution (RULER)"

    asked: PositiveInt = 3
    words: PositiveInt = 200
    alpha: float = Field(2.0, gt=1, allow_inf_nan=False)

    def check(self, source: Source, length: int, seed: int) -> None:
        if self.words < self.asked:
            raise InvalidInputError(f"{self.name}: words ({self.words}) must be at least asked ({self.asked}).")
        super().check(source, length, seed)

    def questions(self, source: Source, length: int, rng: np.random.Generator) -> list[Question]:
        names = ["....", *(name.lower() for name in letters(rng, self.words, CODE))]
        pieces = [source.encode(f" {name}") for name in names]
        share = np.arange(1, len(names) + 1, dtype=np.float64) ** -self.alpha
        share /= share.sum()
        head, end = source.encode(FREQUENT_HEAD), source.encode(FREQUENT_QUESTION.format(count=self.asked))
        room = length - len(head) - len(end)
        sizes = np.array([len(piece) for piece in pieces])
        # Counts are expected values and not drawn, so that the order of the words never depends on chance.
        low, high = 0, max(room, 0)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if int(_counts(middle, share) @ sizes) <= room else (low, middle - 1)
        counts = _counts(low, share)
        if counts[self.asked] < 1 or (len(counts) > self.asked + 1 and counts[self.asked] == counts[self.asked + 1]):
            raise InvalidInputError(
                f"{self.name}: {length} tokens are too short to tell the {self.asked} most frequent words from the "
                "others. Give longer lengths, or fewer asked."
            )
        items = np.repeat(np.arange(len(names)), counts)
        prompt = np.concatenate([head, *(pieces[item] for item in rng.permutation(items)), end])
        references = tuple(Reference(name) for name in names[1 : self.asked + 1])
        return [Question(prompt, references, room_for(source, references))]


def _counts(total: int, share: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.floor(total * share).astype(np.int64)


def _size(source: Source, word: str) -> int:
    return len(source.encode(f" {word}"))


def _numbers_size(source: Source, start: int, count: int) -> int:
    """Tokens of the numbers before `count` items of a list, from item `start` on."""
    return sum(len(source.encode(f"\n{number}.")) for number in range(start + 1, start + count + 1))
