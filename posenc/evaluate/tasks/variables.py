"""Variable tracking (RULER, Hsieh et al. 2024, arXiv 2404.06654): follow a chain of assignments through a text."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import PositiveInt

from posenc.evaluate.tasks.base import Source
from posenc.evaluate.tasks.questions import Question, QuestionTask, Reference, hide, room_for
from posenc.evaluate.tasks.words import letters, numbers

HEAD = "Assignments of variables are hidden in the following text. Follow them from variable to variable.\n\n"
QUESTION = (
    "\n\nWhich variables have the value {value}, directly or through other variables? "
    "{count} variables in the text above have the value {value}:"
)
DIGITS, NAME = 5, 5


class VariableTracking(QuestionTask):
    """`chains` chains of `hops` further assignments each; the variables of the first chain are asked for."""

    name: ClassVar[str] = "variable_tracking"
    summary: ClassVar[str] = "variables that have a value through a chain of assignments (RULER)"

    chains: PositiveInt = 1
    hops: PositiveInt = 4

    def questions(self, source: Source, length: int, rng: np.random.Generator) -> list[Question]:
        size = self.hops + 1
        names = np.reshape(letters(rng, self.chains * size, NAME), (self.chains, size)).tolist()
        values = numbers(rng, self.chains, DIGITS)
        needles: list[tuple[float, str]] = []
        for chain, value in zip(names, values, strict=True):
            places = sorted(float(place) for place in rng.random(size))  # a variable is assigned before it is used
            assigned = [value, *(f"VAR {name}" for name in chain[:-1])]
            lines = [f"\nVAR {name} = {right}\n" for name, right in zip(chain, assigned, strict=True)]
            needles += list(zip(places, lines, strict=True))
        question = QUESTION.format(value=values[0], count=size)
        (prompt,) = hide(source, length, rng, what=self.name, head=HEAD, needles=needles, questions=[question])
        references = tuple(Reference(name) for name in names[0])
        return [Question(prompt, references, room_for(source, references))]
