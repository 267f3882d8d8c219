"""Retrieval of a planted random span: can the model copy what it cannot guess from far back?

A span of random tokens is planted into held-out prose; the input ends with its first tokens, and
the rest must be continued. For models that follow words, see :mod:`posenc.evaluate.passkey`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from posenc.errors import InvalidInputError
from posenc.evaluate.perplexity import Mean

SPAN = 12
HINT = 3
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Retrieval:
    """Share of the planted tokens that are the model's first guess, per document, and where they were planted."""

    scores: Mean
    depths: tuple[float, ...]

    def at(self, depth: float) -> Mean:
        """The documents whose span was planted at this depth."""
        return Mean(tuple(s for s, d in zip(self.scores.values, self.depths, strict=True) if d == depth))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the mean at every depth included."""
        return {
            "accuracy": self.scores.mean,
            "standard_error": self.scores.standard_error,
            "documents": len(self.scores.values),
            "by_depth": {f"{depth:g}": self.at(depth).mean for depth in sorted(set(self.depths))},
            "scores": list(self.scores.values),
        }


def plant(document: NDArray[np.int64], span: NDArray[np.int64], depth: float, *, hint: int = HINT) -> NDArray[np.int64]:
    """Overwrite part of a document with a span, and its end with the span again.

    Parameters
    ----------
    document : int64 [L]
        Prose; its length does not change.
    span : int64 [S]
        What is planted. It starts at ``depth`` of the room before the end, and again at ``L - S``;
        the last ``S - hint`` tokens are the ones to retrieve.
    depth : float
        0 is the start of the document, 1 right before the end.

    Raises
    ------
    InvalidInputError
        If the document is shorter than two spans.
    """
    size = len(span)
    if not 0 < hint < size:
        raise InvalidInputError(f"hint: must be at least 1 and below the span's {size} tokens, got {hint}.")
    if len(document) < 2 * size:
        raise InvalidInputError(f"length {len(document)}: too short to plant a span of {size} tokens and repeat it.")
    planted = document.copy()
    start = span_start(len(document), size, depth)
    planted[start : start + size] = planted[-size:] = span
    return planted


def span_start(length: int, size: int, depth: float) -> int:
    """First token of a span of `size` tokens at `depth` of a document that ends with the span again."""
    return int(depth * (length - 2 * size))


def random_tokens(tokenizer: Any) -> NDArray[np.int64]:
    """The token ids that spans are drawn from: all but the special ones."""
    return np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids).astype(np.int64)


def measure(
    model: Any,
    documents: NDArray[np.int64],
    length: int,
    drawn_from: NDArray[np.int64],
    *,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    step: Callable[[str], None] | None = None,
) -> Retrieval:
    """Plant one span per document, depths taking turns, and score its continuation by teacher forcing.

    The spans depend on the seed and the document's number only, so every strategy and every length
    is asked for the same ones.
    """
    scores, planted_at = [], []
    for number, document in enumerate(documents):
        depth = depths[number % len(depths)]
        span = np.random.default_rng([seed, number]).choice(drawn_from, SPAN)
        scores.append(_accuracy(model, torch.from_numpy(plant(document[-length:], span, depth))))
        planted_at.append(depth)
        if step is not None:
            step(f"retrieval at {length}")
    return Retrieval(Mean(tuple(scores)), tuple(planted_at))


@torch.no_grad()
def _accuracy(model: Any, tokens: torch.Tensor) -> float:
    asked = SPAN - HINT
    tokens = tokens.to(model.device)
    logits = model(input_ids=tokens[None], use_cache=False, logits_to_keep=asked + 1).logits[0, :-1]
    return float((logits.argmax(-1) == tokens[-asked:]).float().mean())
