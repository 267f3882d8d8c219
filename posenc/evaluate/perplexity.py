"""Scores of several documents as one number with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


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
class PerplexityScore:
    """Perplexity over documents, from the mean negative log likelihood of each document in nats."""

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
        """Plain data, with the loss of every document."""
        return {
            "perplexity": self.value,
            "standard_error": self.standard_error,
            "documents": len(self.losses.values),
            "losses": list(self.losses.values),
        }


@dataclass(frozen=True)
class Retrieval:
    """Share of the planted tokens that the model predicts, per document, and the depth at which each was planted."""

    scores: Mean
    depths: tuple[float, ...]

    def at(self, depth: float) -> Mean:
        """The documents whose span was planted at this depth."""
        return Mean(tuple(s for s, d in zip(self.scores.values, self.depths, strict=True) if d == depth))

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with the mean at every depth."""
        return {
            "accuracy": self.scores.mean,
            "standard_error": self.scores.standard_error,
            "documents": len(self.scores.values),
            "by_depth": {f"{depth:g}": self.at(depth).mean for depth in sorted(set(self.depths))},
            "scores": list(self.scores.values),
        }


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
