"""The base of every task: a few settings, and a measurement that turns a model under a strategy into scores."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from posenc.errors import InvalidInputError
from posenc.evaluate import fingerprint
from posenc.evaluate.perplexity import Mean
from posenc.evaluate.texts import BUILT_IN, Text, tokenize

if TYPE_CHECKING:
    from posenc.config import Config
    from posenc.evaluate.models import Loaded
    from posenc.hf.handle import Handle
    from posenc.positions import PositionStrategy


class Sample(BaseModel):
    """One score.

    Parameters
    ----------
    document : int
        Number of the document. Samples of one document share its text and are not independent, so errors are over
        documents.
    score : float
        Nats per token for losses, otherwise the share that is right; None in a file if it was not a number.
    depth : float, optional
        Where the needle was hidden: 0 is the start of the context, 1 its end.
    expected, answer : str, optional
        The right answer, and the model's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    document: NonNegativeInt
    score: float | None
    depth: float | None = None
    expected: str | None = None
    answer: str | None = None


def over_documents(samples: Sequence[Sample]) -> Mean:
    """One value per document: the mean of its samples. A score of None counts as NaN."""
    by_document: dict[int, list[float]] = {}
    for sample in samples:
        by_document.setdefault(sample.document, []).append(math.nan if sample.score is None else sample.score)
    return Mean(tuple(float(np.mean(scores)) for _, scores in sorted(by_document.items())))


@dataclass(frozen=True)
class Source:
    """A text, and the tokenizer of the model that reads it."""

    tokenizer: Any
    text: Text

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """int64 [T], without special tokens."""
        return tokenize(self.tokenizer, self.text)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the text."""
        return fingerprint.of_text(self.text)

    def encode(self, words: str) -> NDArray[np.int64]:
        """Tokens of a piece of a prompt, int64 [T]."""
        return np.asarray(self.tokenizer.encode(words, add_special_tokens=False), dtype=np.int64)

    def require(self, tokens: int, what: str) -> None:
        """Raise InvalidInputError if the text has fewer tokens; `what` begins the message."""
        if len(self.tokens) < tokens:
            raise InvalidInputError(
                f"{what}: the text {self.text.name} has {len(self.tokens)} tokens, and {tokens} are needed. "
                "Give a longer text or shorter lengths."
            )


@dataclass(frozen=True)
class Subject:
    """A model under a strategy."""

    loaded: Loaded
    handle: Handle

    @classmethod
    @contextmanager
    def under(cls, loaded: Loaded, strategy: Config | PositionStrategy) -> Iterator[Subject]:
        """Apply a strategy inside the block; afterwards the model is as it was before."""
        from posenc.hf.apply import apply

        with loaded.threads(), apply(loaded.model, strategy) as handle:
            yield cls(loaded, handle)


class Task(BaseModel, ABC):
    """A task and its settings as a suite gives them; each subclass is one task.

    Class attributes
    ----------------
    name, summary : str
        What a suite calls the task, and one line for ``posenc list --tasks``.
    metric : str
        ``"loss"`` (nats per token) or ``"accuracy"`` (the share that is right).
    version : int
        Rises when the same settings give other prompts or scores: old results are then measured again.
    unnamed : frozenset of str
        Settings that :attr:`title` leaves out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    summary: ClassVar[str]
    metric: ClassVar[Literal["loss", "accuracy"]] = "accuracy"
    version: ClassVar[int] = 1
    unnamed: ClassVar[frozenset[str]] = frozenset({"documents"})

    text: str = Field(BUILT_IN, min_length=1)
    documents: PositiveInt = 4

    def fitted(self, lengths: Sequence[int]) -> Task:
        """The task for a suite of these lengths, if it depends on the longest one."""
        return self

    @abstractmethod
    def check(self, source: Source, length: int, seed: int) -> None:
        """Raise InvalidInputError if the length has no room for the task, or the text is too short."""

    @abstractmethod
    def measure(self, subject: Subject, source: Source, length: int, seed: int) -> Iterable[Sample]:
        """Measure a model. Samples may be yielded one by one, so that progress can be shown."""

    @property
    def prefills(self) -> int:
        """Inputs of the full length that one cell reads, approximately; for time estimates."""
        return self.documents

    def settings(self) -> dict[str, Any]:
        """Everything that determines the prompts, as plain data; the text is identified by its content instead."""
        return {"task": self.name, "version": self.version, **self.model_dump(mode="json", exclude={"text"})}

    @property
    def title(self) -> str:
        """A name for tables: that of the task, and the settings that differ from their defaults."""
        changed = self.model_dump(mode="json", exclude_defaults=True, exclude=set(self.unnamed))
        settings = ", ".join(f"{key}={value}" for key, value in changed.items() if not isinstance(value, list))
        return f"{self.name} ({settings})" if settings else self.name
