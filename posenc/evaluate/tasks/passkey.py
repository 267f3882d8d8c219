"""The passkey tasks, for models that follow words: remember numbers across a long text."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from posenc.evaluate.tasks.base import Source
from posenc.evaluate.tasks.depths import Depth, Depths
from posenc.evaluate.tasks.questions import Question, QuestionTask, Reference, hide, room_for
from posenc.evaluate.tasks.words import THINGS, numbers, things

NEEDLE = "\n\nThe {name} is {key}. Remember it. {key} is the {name}.\n\n"
QUESTION = "\n\nWhat is the {name}? The {name} is"
DIGITS = 5
PASS_KEY = "pass key"


class Passkey(QuestionTask):
    """A number of five digits at every depth, each of another thing: a pass key, a door code, a room number.

    The keys are those of Mohtashami and Jaggi 2023 (arXiv 2305.16300), but in prose rather than in one repeated
    sentence. With several depths the prompt holds several keys and is read only once. The keys belong to different
    things because small models mix up keys that differ in a name alone even inside their window, and the score would
    measure that.
    """

    name: ClassVar[str] = "passkey"
    summary: ClassVar[str] = "five digits at every depth, each of another thing"

    depths: Annotated[Depths, Field(max_length=len(THINGS))] = (0.1, 0.5, 0.9)

    def questions(self, source: Source, length: int, rng: np.random.Generator) -> list[Question]:
        names = things(rng, len(self.depths))
        keys = numbers(rng, len(self.depths), DIGITS)
        needles = [
            (depth, NEEDLE.format(name=name, key=key))
            for depth, name, key in zip(self.depths, names, keys, strict=True)
        ]
        questions = [QUESTION.format(name=name) for name in names]
        prompts = hide(source, length, rng, what=self.name, needles=needles, questions=questions)
        references = [(Reference(key, depth),) for depth, key in zip(self.depths, keys, strict=True)]
        return [
            Question(prompt, expected, room_for(source, expected))
            for prompt, expected in zip(prompts, references, strict=True)
        ]


class SinglePasskey(QuestionTask):
    """One pass key at one depth, scored by the share of its digits that the answer begins with.

    ``posenc demo --model smollm2`` asks this. Every length and depth has a different key and piece of prose.
    """

    name: ClassVar[str] = "single_passkey"
    summary: ClassVar[str] = "one pass key of five digits at one depth"

    depth: Depth = 0.5

    def random(self, length: int, seed: int, document: int) -> np.random.Generator:
        return np.random.default_rng([seed, length, round(self.depth * 1000), document])

    def questions(self, source: Source, length: int, rng: np.random.Generator) -> list[Question]:
        key = "".join(str(digit) for digit in rng.integers(1, 10, DIGITS))
        needles = [(self.depth, NEEDLE.format(name=PASS_KEY, key=key))]
        questions = [QUESTION.format(name=PASS_KEY)]
        (prompt,) = hide(source, length, rng, what=self.name, needles=needles, questions=questions)
        return [Question(prompt, (Reference(key, self.depth),), 2 * DIGITS)]

    def score(self, reference: Reference, answer: str) -> float:
        """Share of the key's digits that the digits of the answer begin with; 1 for the whole key."""
        digits = [character for character in answer if character.isdigit()]
        right = 0
        for digit, expected in zip(digits, reference.text, strict=False):
            if digit != expected:
                break
            right += 1
        return right / len(reference.text)
