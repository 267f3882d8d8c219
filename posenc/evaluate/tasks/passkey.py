"""The passkey task with one or several keys, each asked for after one prefill."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from posenc.evaluate.tasks.base import Source
from posenc.evaluate.tasks.depths import Depths
from posenc.evaluate.tasks.questions import Question, QuestionTask, Reference, hide, room_for
from posenc.evaluate.tasks.words import THINGS, numbers, things

NEEDLE = "\n\nThe {name} is {key}. Remember it. {key} is the {name}.\n\n"
QUESTION = "\n\nWhat is the {name}? The {name} is"
DIGITS = 5


class Passkey(QuestionTask):
    """A number of five digits at every depth, each of another thing: a pass key, a door code, a room number.

    Like the passkeys of Mohtashami and Jaggi 2023 (arXiv 2305.16300), in prose rather than in one repeated
    sentence; with several depths the prompt holds several keys, and must be read only once. Small models mix up keys
    that differ in a name alone even inside their window, and the score would then tell of that.
    """

    kind: ClassVar[str] = "passkey"

    depths: Annotated[Depths, Field(max_length=len(THINGS))] = (0.1, 0.5, 0.9)

    def questions(self, source: Source, length: int, rng: np.random.Generator) -> list[Question]:
        names = things(rng, len(self.depths))
        keys = numbers(rng, len(self.depths), DIGITS)
        needles = [
            (depth, NEEDLE.format(name=name, key=key))
            for depth, name, key in zip(self.depths, names, keys, strict=True)
        ]
        asked = [QUESTION.format(name=name) for name in names]
        prompts = hide(source, length, rng, what=self.kind, needles=needles, questions=asked)
        found = [(Reference(key, depth),) for depth, key in zip(self.depths, keys, strict=True)]
        return [
            Question(prompt, references, room_for(source, references))
            for prompt, references in zip(prompts, found, strict=True)
        ]
