"""Score one strategy's candidates at one length on the same documents, and drop the clearly bad ones early."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posenc.evaluate.calibrate.losses import DocumentLosses
from posenc.evaluate.calibrate.search import Candidate
from posenc.evaluate.perplexity import Mean

FIRST_ROUND = 8
STOP_ERRORS = 3.0
STOP_NATS = 0.02
STOPPING = (
    f"after {FIRST_ROUND} documents, and whenever their number has doubled, a candidate is dropped whose mean paired "
    f"difference to the best one exceeds {STOP_ERRORS:g} standard errors and {STOP_NATS:g} nats per token"
)


@dataclass(frozen=True)
class ScoredCandidate:
    """A candidate and its losses.

    Parameters
    ----------
    candidate : Candidate
        Strategy and parameters.
    losses : Mean
        Of the documents it was scored on: all of them, or the first few if it was dropped.
    max_relative : float
        Largest relative distance in its plan.
    """

    candidate: Candidate
    losses: Mean
    max_relative: float


@dataclass(frozen=True)
class CandidateSweep:
    """All candidates of one strategy at one length."""

    strategy: str
    length: int
    documents: int
    points: tuple[ScoredCandidate, ...]

    @property
    def best(self) -> ScoredCandidate:
        """The candidate with the lowest mean loss among those that were scored on every document."""
        return min((p for p in self.points if not self.dropped(p)), key=lambda point: point.losses.mean)

    def dropped(self, point: ScoredCandidate) -> bool:
        """True if a candidate was clearly bad and scored on the first documents only."""
        return len(point.losses.values) < self.documents

    def gap_to_best(self, point: ScoredCandidate) -> Mean:
        """Paired differences to the best candidate, over the documents both were scored on."""
        return Mean(paired(point.losses, self.best.losses))

    def completed(self, points: list[ScoredCandidate]) -> NDArray[np.float64]:
        """Losses, float64 [points, documents]; after a candidate was dropped, those of the best plus the mean gap."""
        best = np.array(self.best.losses.values)
        rows = []
        for point in points:
            row = best + self.gap_to_best(point).mean
            row[: len(point.losses.values)] = point.losses.values
            rows.append(row)
        return np.stack(rows)


def paired(one: Mean, other: Mean) -> tuple[float, ...]:
    """Differences over the documents that both were scored on."""
    return tuple(a - b for a, b in zip(one.values, other.values, strict=False))


def rounds(documents: int) -> list[int]:
    """Numbers of documents after which candidates may be dropped; the last is all of them."""
    stops = []
    stop = FIRST_ROUND
    while stop < documents:
        stops.append(stop)
        stop *= 2
    return [*stops, documents]


def survivors(losses: dict[int, Mean]) -> set[int]:
    """The candidates that stay, by the rule in :data:`STOPPING`."""
    best = min(losses.values(), key=lambda mean: mean.mean)
    kept = set()
    for number, mean in losses.items():
        gap = mean.minus(best)
        if not (gap.mean > STOP_NATS and gap.mean > STOP_ERRORS * gap.standard_error):
            kept.add(number)
    return kept


def sweep(losses: DocumentLosses, candidates: list[Candidate], length: int) -> CandidateSweep:
    """Score candidates round by round. Losses measured before are read, so a second run decides the same."""
    documents = len(losses.corpus.documents)
    means: dict[int, Mean] = {}
    alive = set(range(len(candidates)))
    scored = 0
    for stop in rounds(documents):
        means |= {number: losses.of(candidates[number], length, stop, before=scored) for number in sorted(alive)}
        scored = stop
        kept = survivors({number: means[number] for number in alive}) if stop < documents else alive
        for number in alive - kept:
            losses.skip(candidates[number], length, documents - stop)
        alive = kept
    points = tuple(
        ScoredCandidate(candidate, means[number], candidate.strategy.plan(length).max_relative)
        for number, candidate in enumerate(candidates)
    )
    return CandidateSweep(candidates[0].name, length, documents, points)
