"""Needles in a haystack, the four kinds of RULER (Hsieh et al. 2024, arXiv 2404.06654, section 3).

The definitions are RULER's. The wording, words and haystacks are our own, so scores can be compared between
strategies, but not with published ones.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field, PositiveInt

from posenc.evaluate.tasks.base import Source
from posenc.evaluate.tasks.depths import Depths
from posenc.evaluate.tasks.questions import Question, QuestionTask, Reference, hide, room_for
from posenc.evaluate.tasks.words import numbers, phrases

HEAD = "Secret numbers are hidden in the following text. Remember them, there will be a question about them.\n\n"
NEEDLE = "\nOne of the secret numbers of {key} is: {value}.\n"
ASK_ONE = "\n\nWhat is the secret number of {keys} in the text above? The secret number of {keys} is"
ASK_MANY = "\n\nWhat are all the secret numbers of {keys} in the text above? The secret numbers of {keys} are"
DIGITS = 7


def _spread(count: int) -> list[float]:
    """Depths in the middle of `count` equal parts."""
    return [(number + 0.5) / count for number in range(count)]


class _Needles(QuestionTask):
    """Makes prompts from ``(depth, key, value)`` triples and the keys that the question asks for."""

    def _ask(
        self,
        source: Source,
        length: int,
        rng: np.random.Generator,
        hidden: list[tuple[float, str, str]],
        keys: list[str],
    ) -> Question:
        template = ASK_ONE if sum(key in keys for _, key, _ in hidden) == 1 else ASK_MANY
        (prompt,) = hide(
            source,
            length,
            rng,
            what=self.name,
            head=HEAD,
            needles=[(depth, NEEDLE.format(key=key, value=value)) for depth, key, value in hidden],
            questions=[template.format(keys=_listed(keys))],
        )
        references = tuple(Reference(value, depth) for depth, key, value in hidden if key in keys)
        return Question(prompt, references, room_for(source, references))


class _OneByOne(_Needles):
    """The needle moves through the depths in an otherwise constant haystack."""

    depths: Depths = (0.1, 0.3, 0.5, 0.7, 0.9)

    @property
    def prefills(self) -> int:
        return self.documents * len(self.depths)

    def _moving(
        self, source: Source, length: int, rng: np.random.Generator, distractors: list[tuple[float, str, str]]
    ) -> list[Question]:
        (key,), (value,) = self._new(rng, distractors)
        state = rng.bit_generator.state
        questions = []
        for depth in sorted(self.depths, reverse=True):  # deepest first: the next shares what precedes it
            rng.bit_generator.state = state
            questions.append(self._ask(source, length, rng, [*distractors, (depth, key, value)], [key]))
        return questions

    @staticmethod
    def _new(rng: np.random.Generator, distractors: list[tuple[float, str, str]]) -> tuple[list[str], list[str]]:
        keys = {key for _, key, _ in distractors}
        values = {value for _, _, value in distractors}
        key = next(name for name in phrases(rng, len(keys) + 1) if name not in keys)
        value = next(number for number in numbers(rng, len(values) + 1, DIGITS) if number not in values)
        return [key], [value]


class SingleNeedle(_OneByOne):
    """One key with one value."""

    name: ClassVar[str] = "needle_single"
    summary: ClassVar[str] = "one hidden number (RULER)"

    def questions(self, source: Source, length: int, rng: np.random.Generator) -> list[Question]:
        return self._moving(source, length, rng, [])


class MultiKey(_OneByOne):
    """One key is asked for; the others are distractors."""

    name: ClassVar[str] = "needle_multikey"
    summary: ClassVar[str] = "one of several hidden numbers, by its key (RULER)"

    keys: int = Field(4, ge=2)

    def questions(self, source: Source, length: int, rng: np.random.Generator) -> list[Question]:
        others = self.keys - 1
        distractors = list(zip(_spread(others), phrases(rng, others), numbers(rng, others, DIGITS), strict=True))
        return self._moving(source, length, rng, distractors)


class MultiValue(_Needles):
    """One key with several values, all of which are asked for."""

    name: ClassVar[str] = "needle_multivalue"
    summary: ClassVar[str] = "all numbers hidden under one key (RULER)"

    values: int = Field(4, ge=2)

    def questions(self, source: Source, length: int, rng: np.random.Generator) -> list[Question]:
        (key,) = phrases(rng, 1)
        values = numbers(rng, self.values, DIGITS)
        hidden = [(depth, key, value) for depth, value in zip(_spread(self.values), values, strict=True)]
        return [self._ask(source, length, rng, hidden, [key])]


class MultiQuery(_Needles):
    """Several keys, all of which are asked for in one question."""

    name: ClassVar[str] = "needle_multiquery"
    summary: ClassVar[str] = "the numbers of several keys in one question (RULER)"

    keys: PositiveInt = Field(4, ge=2)

    def questions(self, source: Source, length: int, rng: np.random.Generator) -> list[Question]:
        keys, values = phrases(rng, self.keys), numbers(rng, self.keys, DIGITS)
        return [self._ask(source, length, rng, list(zip(_spread(self.keys), keys, values, strict=True)), keys)]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
