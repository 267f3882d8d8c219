"""The fit of LaMPE's curve finds a known optimum, stays inside the window, and reports its uncertainty."""

from __future__ import annotations

import numpy as np
import pytest

import posenc
from posenc.errors import InvalidInputError
from posenc.evaluate.calibrate import curve
from posenc.evaluate.calibrate.search import Candidate
from posenc.evaluate.calibrate.sweep import CandidateSweep, ScoredCandidate
from posenc.evaluate.perplexity import Mean

WINDOW, DOCUMENTS = 256, 40
TRIED = (32, 64, 96, 128, 160, 192, 224, 256)


def sweep(length: int, best: dict[int, float], *, noise: float = 0.001, steep: float = 1.0) -> CandidateSweep:
    """Return losses that form a V in log U around `best[head]`; larger heads cost a little."""
    rng = np.random.default_rng([length, 7])
    documents = rng.normal(3, 1, DOCUMENTS)
    points = []
    for head, optimum in best.items():
        for mapping in TRIED:
            candidate = Candidate("lampe", {"head": head, "mapping": mapping}, WINDOW)
            loss = steep * abs(np.log(mapping / optimum)) + 0.001 * head
            values = documents + loss + rng.normal(0, noise, DOCUMENTS)
            points.append(ScoredCandidate(candidate, Mean(tuple(values)), candidate.strategy.plan(length).max_relative))
    return CandidateSweep("lampe", length, DOCUMENTS, tuple(points))


def mapped(fit: curve.Fit, length: int) -> int:
    return posenc.strategy("lampe", window=WINDOW, mapping=fit.mapping).mapping_length(length)


def test_the_fit_finds_the_optimum_of_every_length():
    sweeps = [sweep(512, {16: 64}), sweep(1024, {16: 96}), sweep(2048, {16: 160})]
    fit = curve.fit_curve(sweeps, WINDOW, seed=0)
    assert abs(mapped(fit, 512) - 64) <= 6
    assert abs(mapped(fit, 2048) - 160) <= 10
    assert 60 < mapped(fit, 1024) < 120
    for length in (512, 2048):
        low, high = fit.confidence.mapping_length[length]
        assert low <= mapped(fit, length) <= high
        assert high - low < 20


def test_an_uncertain_optimum_has_a_wide_interval():
    clear, vague = (
        curve.fit_curve([sweep(length, {16: 96}, noise=noise, steep=steep) for length in (512, 2048)], WINDOW, seed=0)
        for noise, steep in ((0.001, 1.0), (1.0, 0.02))
    )
    widths = [high - low for fit in (clear, vague) for low, high in fit.confidence.mapping_length.values()]
    assert max(widths[:2]) < 20
    assert max(widths[2:]) > 60


@pytest.mark.parametrize("optimum", [224, 999])
def test_the_curve_stays_inside_the_window_for_any_data(optimum: int):
    lengths = [512, 1024, 2048]
    fit = curve.fit_curve([sweep(length, {32: optimum}) for length in lengths], WINDOW, seed=0)
    fitted = posenc.strategy("lampe", window=WINDOW, head=fit.head, tail=fit.tail, mapping=fit.mapping)
    assert max(fitted.plan(length).max_relative for length in lengths) < WINDOW
    bound = curve.largest_inside(32, lengths, WINDOW)
    beyond = posenc.strategy("lampe", window=WINDOW, head=32, mapping=bound + 1)
    assert max(beyond.plan(length).max_relative for length in lengths) >= WINDOW
    assert int(fit.mapping["c"]) == bound
    assert posenc.strategy("lampe", window=WINDOW, mapping=fit.mapping).mapping_length(10**6) <= bound


def test_a_falling_optimum_becomes_a_constant():
    fit = curve.fit_curve([sweep(512, {16: 160}), sweep(2048, {16: 64})], WINDOW, seed=0)
    assert fit.mapping["a"] == 0
    assert 64 <= mapped(fit, 512) == mapped(fit, 2048) <= 160


def test_one_length_gives_a_constant():
    fit = curve.fit_curve([sweep(1024, {16: 96})], WINDOW, seed=0)
    assert fit.mapping["a"] == 0
    assert abs(mapped(fit, 1024) - 96) <= 6


def test_the_head_that_costs_least_is_chosen_with_its_own_curve():
    fit = curve.fit_curve([sweep(length, {16: 64, 64: 128}) for length in (512, 2048)], WINDOW, seed=0)
    assert fit.head == 16  # larger heads cost a little here
    assert abs(mapped(fit, 2048) - 64) <= 6


def test_no_candidate_inside_the_window_is_an_error():
    sweeps = [sweep(512, {250: 64})]
    with pytest.raises(InvalidInputError, match="no mapping length that was tried keeps every distance inside"):
        curve.fit_curve(sweeps, WINDOW, seed=0)


def test_the_fit_is_reproducible():
    sweeps = [sweep(512, {16: 64}, noise=0.5), sweep(2048, {16: 128}, noise=0.5)]
    assert curve.fit_curve(sweeps, WINDOW, seed=3) == curve.fit_curve(sweeps, WINDOW, seed=3)
