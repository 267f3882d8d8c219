"""Fit LaMPE's mapping length ``U(l) = int(c / (1 + exp(-(a l + b))))`` to its sweeps.

Three free parameters on a handful of lengths are degenerate: curves with very different c pass through the same
points. So c is not fitted: it is the largest mapping length whose plan keeps every distance inside the window at every
length that was measured. The other two follow from U at the shortest and at the longest length, which are
chosen to minimize the measured loss itself, interpolated between the mapping lengths tried. (Fitting U to the best
point of each length would ignore how flat each minimum is.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posenc.calibration.file import Confidence
from posenc.errors import InvalidInputError
from posenc.evaluate.calibrate.sweep import CandidateSweep, ScoredCandidate
from posenc.plugins import strategy

STEPS = 48
"""Values of U tried at each end."""
SAMPLES = 1000
"""Resamplings of the documents."""
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Fit:
    """A fitted curve, the head and tail it was measured with, and its confidence intervals."""

    mapping: dict[str, float]
    head: int
    tail: int
    confidence: Confidence


@dataclass(frozen=True)
class _HeadCurves:
    """The curves that stay inside the window for one head, and what is needed to compute their losses."""

    head: int
    tail: int
    c: float
    curves: NDArray[np.float64]  # a and b, [curves, 2]
    weights: tuple[NDArray[np.float64], ...]  # per length, interpolation of the loss, [curves, points]
    losses: tuple[NDArray[np.float64], ...]  # per length, [points, documents]

    def costs(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Mean loss of every curve, summed over lengths, [curves, samples]; `counts` is [documents, samples]."""
        share = counts / counts.sum(axis=0)
        total = np.zeros((len(self.curves), counts.shape[1]))
        for weight, loss in zip(self.weights, self.losses, strict=True):
            total += weight @ (loss @ share)
        return total


def fit_curve(sweeps: list[CandidateSweep], window: int, *, seed: int) -> Fit:
    """Fit the curve to the sweeps of ``lampe``, one per length; the head with the lowest loss is chosen with it.

    Raises
    ------
    InvalidInputError
        If no mapping length that was tried stays inside the window at every length.
    """
    heads = sorted({int(point.candidate.params["head"]) for sweep in sweeps for point in sweep.points})
    prepared = [curves for head in heads if (curves := _prepare(head, sweeps, window)) is not None]
    if not prepared:
        raise InvalidInputError(
            "lampe: no mapping length that was tried keeps every distance inside the window at every length. "
            "Calibrate shorter lengths."
        )
    once = np.ones((sweeps[0].documents, 1))
    chosen = min(prepared, key=lambda curves: float(curves.costs(once).min()))
    best = int(chosen.costs(once)[:, 0].argmin())
    lengths = [sweep.length for sweep in sweeps]
    rng = np.random.default_rng(seed)
    documents = sweeps[0].documents
    counts = rng.multinomial(documents, [1 / documents] * documents, size=SAMPLES).T.astype(np.float64)
    sampled = chosen.curves[chosen.costs(counts).argmin(axis=0)]
    a, b = (float(f"{value:.6g}") for value in chosen.curves[best])
    confidence = Confidence(
        samples=SAMPLES,
        a=_interval(sampled[:, 0]),
        b=_interval(sampled[:, 1]),
        mapping_length={length: _whole(_interval(_mapped(chosen.c, sampled, length))) for length in lengths},
    )
    return Fit({"c": chosen.c, "a": a, "b": b}, chosen.head, chosen.tail, confidence)


def largest_inside(head: int, lengths: list[int], window: int) -> int:
    """Largest mapping length whose plan keeps ``max_relative`` below the window at every length; 0 if there is none."""

    def inside(mapping: int) -> bool:
        lampe = strategy("lampe", window=window, head=head, mapping=mapping)
        return all(lampe.plan(length).max_relative < window for length in lengths)

    return next((mapping for mapping in range(window, 0, -max(1, window // 256)) if inside(mapping)), 0)


def _prepare(head: int, sweeps: list[CandidateSweep], window: int) -> _HeadCurves | None:
    lengths = [sweep.length for sweep in sweeps]
    bound = largest_inside(head, lengths, window)
    points: list[list[ScoredCandidate]] = []
    for sweep in sweeps:
        usable = [p for p in sweep.points if p.candidate.params["head"] == head and p.max_relative < window]
        points.append(sorted(usable, key=lambda point: int(point.candidate.params["mapping"])))
    if not bound or not all(points):
        return None
    c = bound + 0.999  # int() cuts it to the bound
    lowest = max(int(usable[0].candidate.params["mapping"]) for usable in points)
    ends = np.geomspace(min(lowest, bound), 0.995 * bound, STEPS)
    first, last = (grid.ravel() for grid in np.meshgrid(ends, ends))
    rising = last >= first if lengths[-1] > lengths[0] else last == first
    low, high = (np.log(u / (c - u)) for u in (first[rising], last[rising]))
    a = (high - low) / max(lengths[-1] - lengths[0], 1)
    curves = np.stack([a, low - a * lengths[0]], axis=1)
    weights = tuple(
        _interpolation(_mapped(c, curves, length), [int(p.candidate.params["mapping"]) for p in usable])
        for length, usable in zip(lengths, points, strict=True)
    )
    losses = tuple(sweep.completed(usable) for sweep, usable in zip(sweeps, points, strict=True))
    tail = int(points[0][0].candidate.strategy.tail)  # type: ignore[attr-defined]
    return _HeadCurves(head, tail, c, curves, weights, losses)


def _mapped(c: float, curves: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """U at one length before rounding, [curves]."""
    mapped: NDArray[np.float64] = c / (1 + np.exp(-(curves[:, 0] * length + curves[:, 1])))
    return mapped


def _interpolation(values: NDArray[np.float64], tried: list[int]) -> NDArray[np.float64]:
    """Weights [values, tried] of linear interpolation; constant beyond both ends."""
    units = np.eye(len(tried))
    return np.stack([np.interp(values, tried, unit) for unit in units], axis=1)


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, INTERVAL)
    return float(f"{low:.4g}"), float(f"{high:.4g}")


def _whole(interval: tuple[float, float]) -> tuple[int, int]:
    return math.floor(interval[0]), math.floor(interval[1])
