"""Compare strategies on the same documents: what ``posenc ppl`` and ``posenc demo`` measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posenc.config import Config
from posenc.evaluate.models import Loaded
from posenc.evaluate.perplexity import PerplexityScore, Retrieval
from posenc.evaluate.tasks.base import Sample, Source, Subject, Task, over_documents
from posenc.evaluate.tasks.prose import Perplexity
from posenc.evaluate.tasks.spans import SingleSpan

SEED = 0
PERPLEXITY, RETRIEVAL = "perplexity", "retrieval"


@dataclass(frozen=True)
class Comparison:
    """One text, input lengths in tokens, and the tasks; every length reads the ends of the same documents.

    Parameters
    ----------
    source : Source
    lengths : sequence of int
    perplexity : Perplexity
    retrieval : SingleSpan, optional
        Not measured where None.
    """

    source: Source
    lengths: Sequence[int]
    perplexity: Perplexity
    retrieval: SingleSpan | None = None

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks by the names that results carry."""
        return {PERPLEXITY: self.perplexity} | ({RETRIEVAL: self.retrieval} if self.retrieval is not None else {})

    @property
    def documents(self) -> int:
        """Documents that perplexity is measured on."""
        return len(self.perplexity.cut(self.source, max(self.lengths), SEED))

    @property
    def retrieval_documents(self) -> int:
        """Documents that a span is planted into."""
        return 0 if self.retrieval is None else len(self.retrieval.cut(self.source, max(self.lengths), SEED))

    def steps(self, strategies: int) -> int:
        """Forward passes in all, for the progress bar."""
        return strategies * len(self.lengths) * (self.documents + self.retrieval_documents)


@dataclass
class StrategyScores:
    """What one strategy scored, by input length."""

    config: Config
    perplexity: dict[int, PerplexityScore] = field(default_factory=dict)
    retrieval: dict[int, Retrieval] = field(default_factory=dict)

    def add(self, task: str, length: int, samples: Sequence[Sample]) -> None:
        """Add what was measured for one task at one length."""
        scores = over_documents(samples)
        if task == PERPLEXITY:
            self.perplexity[length] = PerplexityScore(scores)
        else:
            depths = tuple(sample.depth for sample in samples if sample.depth is not None)
            self.retrieval[length] = Retrieval(scores, depths)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "config": self.config.as_dict(),
            "perplexity": {str(length): score.as_dict() for length, score in self.perplexity.items()},
            "retrieval": {str(length): score.as_dict() for length, score in self.retrieval.items()},
        }


def prepare(
    source: Source, lengths: Sequence[int], *, scored: int, documents: int, retrieval_documents: int = 0
) -> Comparison:
    """Fit the tasks to a text and input lengths.

    Parameters
    ----------
    scored : int
        Tokens scored at the end of each document, for perplexity.
    documents, retrieval_documents : int
        Most documents of each task; a short text has fewer. 0 leaves retrieval out.

    Raises
    ------
    InvalidInputError
        If a length has no room for a task, or the text is too short.
    """
    perplexity = Perplexity(documents=documents, scored=scored).fitted(lengths)
    retrieval = None
    if retrieval_documents:
        retrieval = SingleSpan(documents=retrieval_documents, apart=scored).fitted(lengths)
    comparison = Comparison(source, lengths, perplexity, retrieval)
    for task in comparison.tasks.values():
        for length in lengths:
            task.check(source, length, SEED)
    return comparison


def compare(
    loaded: Loaded,
    configs: Mapping[str, Config],
    comparison: Comparison,
    step: Callable[[str], None] = lambda description: None,
) -> dict[str, StrategyScores]:
    """Measure every configuration on the same documents; afterwards the model is as it was before.

    Parameters
    ----------
    loaded : Loaded
        The model; each configuration is applied to it and removed again.
    configs : mapping of str to Config
        By the label that results carry.
    comparison : Comparison
    step : callable, optional
        Called with a description after every document.
    """
    scores = {label: StrategyScores(config) for label, config in configs.items()}
    for label, strategy_scores in scores.items():
        with Subject.under(loaded, strategy_scores.config) as subject:
            for length in comparison.lengths:
                for name, task in comparison.tasks.items():
                    samples = []
                    for sample in task.measure(subject, comparison.source, length, SEED):
                        samples.append(sample)
                        step(f"{label}: {name} at {length}")
                    strategy_scores.add(name, length, samples)
    return scores
