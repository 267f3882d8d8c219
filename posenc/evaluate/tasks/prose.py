"""Sliding perplexity: how well a model predicts text that it reads through a window of a given length.

Every length scores the same tokens of the same documents; only how much text precedes them differs. So the loss of
a model that uses its context falls with length, and a model that breaks shows a rise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt

from posenc.errors import InvalidInputError
from posenc.evaluate.tasks.base import Sample, Source, Subject, Task
from posenc.evaluate.tasks.documents import spread

SCORED = 128
"""Tokens scored at the end of each document, by default."""


class Perplexity(Task):
    """Loss of the last `scored` tokens of windows of text.

    The windows slide over the text so that no token is scored twice; `documents` of them, spread evenly, are
    read. Every length of a suite scores the same tokens: `longest` is the length of the longest input.
    """

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "loss of the last tokens of windows of text"
    metric: ClassVar[Literal["loss", "accuracy"]] = "loss"
    unnamed: ClassVar[frozenset[str]] = frozenset({"documents", "longest"})

    documents: PositiveInt = 32
    scored: PositiveInt = SCORED
    longest: PositiveInt | None = None

    def fitted(self, lengths: Sequence[int]) -> Perplexity:
        return self if self.longest is not None else self.model_copy(update={"longest": max(lengths)})

    def check(self, source: Source, length: int, seed: int) -> None:
        check_lengths([length], self.scored)
        self.cut(source, length, seed)

    def cut(self, source: Source, length: int, seed: int) -> NDArray[np.int64]:
        """The documents, int64 [N, max(longest, length)]."""
        return spread(source, max(length, self.longest or 0), self.documents, apart=self.scored, seed=seed)

    def measure(self, subject: Subject, source: Source, length: int, seed: int) -> Iterator[Sample]:
        losses = document_losses(subject.loaded.model, self.cut(source, length, seed), length, self.scored)
        for number, loss in enumerate(losses):
            yield Sample(document=number, score=loss)


def check_lengths(lengths: Sequence[int], scored: int) -> None:
    """Raise InvalidInputError unless every length holds the scored tokens and one before them."""
    if not lengths:
        raise InvalidInputError("lengths: give at least one input length in tokens.")
    if scored < 1:
        raise InvalidInputError(f"score: must be at least 1 token, got {scored}.")
    for length in lengths:
        if length < scored + 1:
            raise InvalidInputError(
                f"length {length}: must be at least {scored + 1}, the {scored} scored tokens and one before them. "
                "Give longer lengths or a smaller score."
            )


def document_losses(model: Any, documents: NDArray[np.int64], length: int, scored: int) -> Iterator[float]:
    """Mean loss of the last `scored` tokens of each document, read from its last `length` tokens.

    Parameters
    ----------
    model
        A causal language model, with a strategy applied or not.
    documents : int64 [N, L]
        ``L >= length``.
    length, scored : int
        ``1 <= scored < length``.

    Yields
    ------
    float
        Nats per token.
    """
    for document in documents:
        tokens = torch.from_numpy(document[-length:].copy()).to(model.device)
        with torch.inference_mode():
            # Without a cache and with the scored logits only: vocabulary x length logits would not fit.
            logits = model(input_ids=tokens[None], use_cache=False, logits_to_keep=scored + 1).logits[0, :-1]
            loss = float(torch.nn.functional.cross_entropy(logits.float(), tokens[-scored:]))
        yield loss
