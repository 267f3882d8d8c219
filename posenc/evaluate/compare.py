"""Run several strategies over the same documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from posenc.config import Config
from posenc.evaluate import perplexity, retrieval
from posenc.evaluate.models import Loaded
from posenc.evaluate.perplexity import Perplexity
from posenc.evaluate.retrieval import Retrieval


@dataclass(frozen=True)
class Task:
    """What to measure.

    Parameters
    ----------
    lengths : sequence of int
        Input lengths in tokens.
    documents : int64 [N, L]
        For perplexity, ``L >= max(lengths)``.
    scored : int
        Tokens scored at the end of each input.
    retrieval_documents : int64 [M, L], optional
        For retrieval; left out where None.
    """

    lengths: Sequence[int]
    documents: NDArray[np.int64]
    scored: int
    retrieval_documents: NDArray[np.int64] | None = None

    def steps(self, strategies: int) -> int:
        """Forward passes in all, for the progress bar."""
        asked = 0 if self.retrieval_documents is None else len(self.retrieval_documents)
        return strategies * len(self.lengths) * (len(self.documents) + asked)


@dataclass
class Outcome:
    """What one strategy scored, by input length."""

    config: Config
    perplexity: dict[int, Perplexity] = field(default_factory=dict)
    retrieval: dict[int, Retrieval] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "config": self.config.as_dict(),
            "perplexity": {str(length): score.as_dict() for length, score in self.perplexity.items()},
            "retrieval": {str(length): score.as_dict() for length, score in self.retrieval.items()},
        }


def compare(
    loaded: Loaded, configs: Mapping[str, Config], task: Task, step: Callable[[str], None] | None = None
) -> dict[str, Outcome]:
    """Measure every configuration on the same documents; the model is as it was afterwards.

    Parameters
    ----------
    loaded : Loaded
        The model; patched and restored for each configuration.
    configs : mapping of str to Config
        By the label that results carry.
    task : Task
        Documents and lengths.
    step : callable, optional
        Called with a description after every forward pass.
    """
    from posenc.hf.apply import apply

    outcomes = {}
    drawn_from = retrieval.random_tokens(loaded.tokenizer)
    for label, config in configs.items():
        outcome = outcomes[label] = Outcome(config)

        def named(description: str, label: str = label) -> None:
            if step is not None:
                step(f"{label}: {description}")

        with loaded.threads(), apply(loaded.model, config):
            for length in task.lengths:
                outcome.perplexity[length] = perplexity.measure(
                    loaded.model, task.documents, length, task.scored, named
                )
                if task.retrieval_documents is not None:
                    outcome.retrieval[length] = retrieval.measure(
                        loaded.model, task.retrieval_documents, length, drawn_from, step=named
                    )
    return outcomes
