"""Perplexity of the last tokens of inputs of a given length, with standard errors.

Every length scores the very same tokens of the very same documents; only how much text precedes
them differs. So a model that uses its context gets better with length, and a break shows as a rise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from posenc.errors import InvalidInputError

DEFAULT_SCORED = 128
DEFAULT_DOCUMENTS = 32


@dataclass(frozen=True)
class Mean:
    """A mean over documents.

    Parameters
    ----------
    values : tuple of float
        One value per document.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over documents."""
        return float(np.mean(self.values))

    @property
    def standard_error(self) -> float:
        """Standard error of the mean; NaN for a single document."""
        count = len(self.values)
        return float(np.std(self.values, ddof=1) / math.sqrt(count)) if count > 1 else math.nan

    def minus(self, other: Mean) -> Mean:
        """Paired differences, document by document."""
        return Mean(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over documents, from each document's mean negative log likelihood in nats."""

    losses: Mean

    @property
    def value(self) -> float:
        """``exp`` of the mean loss."""
        return _exp(self.losses.mean)

    @property
    def standard_error(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.value * self.losses.standard_error

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the loss of every document included."""
        return {
            "perplexity": self.value,
            "standard_error": self.standard_error,
            "documents": len(self.losses.values),
            "losses": list(self.losses.values),
        }


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


def measure(
    model: Any, documents: NDArray[np.int64], length: int, scored: int, step: Callable[[str], None] | None = None
) -> Perplexity:
    """Perplexity of the last `scored` tokens of every document, read from its last `length` tokens.

    Parameters
    ----------
    model
        A causal language model, patched or not.
    documents : int64 [N, L]
        ``L >= length``.
    length, scored : int
        ``1 <= scored < length``.
    step : callable, optional
        Called after every document.
    """
    losses = []
    for document in documents:
        losses.append(_loss(model, torch.from_numpy(document[-length:].copy()), scored))
        if step is not None:
            step(f"perplexity at {length}")
    return Perplexity(Mean(tuple(losses)))


@torch.inference_mode()
def _loss(model: Any, tokens: torch.Tensor, scored: int) -> float:
    # Without a cache and with only the scored logits: vocabulary x length logits would not fit.
    tokens = tokens.to(model.device)
    logits = model(input_ids=tokens[None], use_cache=False, logits_to_keep=scored + 1).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits.float(), tokens[-scored:]))


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
