"""Splitting segments into windowed calls."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import posenc
from posenc.kernels.rotated import rotation_layout
from posenc.kernels.windowed.bands import Band, band_schedule, bands
from posenc.plan import PositionPlan
from posenc.testing import random_plans


def seen(band: Band, key_start: np.ndarray, key_stop: np.ndarray) -> np.ndarray:
    """Return the pairs of a band by its definition, bool [R, K]."""
    row, key = np.arange(*band.rows)[:, None], np.arange(*band.keys)
    if band.irregular:
        return (key >= key_start[row]) & (key < key_stop[row])
    distance = (key - band.keys[0]) - (row - band.rows[0]) - (key.size - row.size)
    left = -np.inf if band.left is None else -band.left
    return (distance >= left) & (distance <= (np.inf if band.right is None else band.right))


@st.composite
def intervals(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draw bounds that stay straight for a while, bend and jump."""
    steps: list[tuple[int, int]] = []
    for _ in range(draw(st.integers(1, 4))):
        steps.append((draw(st.integers(0, 3)), draw(st.integers(0, 3))))
        steps += [(draw(st.integers(0, 1)), draw(st.integers(0, 1)))] * draw(st.integers(0, 20))
    start, stop = np.array(steps, dtype=np.int64).cumsum(0).T
    return start, stop + draw(st.integers(0, 12))


def jumping() -> tuple[np.ndarray, np.ndarray]:
    """Draw a causal run followed by a band, whose far end jumps where they meet."""
    row = np.arange(24)
    return np.maximum(row - 11, 0), row + 1 + 5 * (row >= 12)


@settings(max_examples=300, deadline=None)
@given(intervals())
@example(jumping())
def test_bands_cover_every_pair_once(bounds: tuple[np.ndarray, np.ndarray]) -> None:
    key_start, key_stop = bounds
    covered = np.zeros((len(key_start), max(1, int(key_stop.max()))), dtype=int)
    for band in bands(key_start, key_stop):
        pairs = seen(band, key_start, key_stop)
        assert pairs.any(axis=1).all(), "flash attention makes +inf of a query that sees nothing"
        assert band.right in (0, None)
        assert band.left is None or band.left >= 0
        covered[slice(*band.rows), slice(*band.keys)] += pairs
    key = np.arange(covered.shape[1])
    assert np.array_equal(covered, (key >= key_start[:, None]) & (key < key_stop[:, None]))


@settings(max_examples=100, deadline=None)
@given(random_plans(), st.floats(0, 1))
def test_a_schedule_covers_the_plan(plan: PositionPlan, share: float) -> None:
    """Every query is merged from exactly the calls that contain it, and every attended pair is in one call."""
    q_len = max(1, round(share * plan.total))
    planned, first = band_schedule(plan, q_len), plan.total - q_len
    layout = rotation_layout(plan, q_len)
    relative = np.full((q_len, plan.total), np.nan)
    for call in planned.calls:
        work = layout.queries[call.query_copy]
        pairs = seen(call.band, work.key_start, work.key_stop)
        if call.allowed is not None:
            assert np.array_equal(call.allowed, pairs)
        assert call.values.stop - call.values.start == call.band.keys[1] - call.band.keys[0]
        part = relative[call.rows, call.values]
        assert np.isnan(part[pairs]).all()
        part[pairs] = call.query_copy
    expected = np.isfinite(plan.relative_positions()[first:])
    assert np.array_equal(np.isfinite(relative), expected.all(-1) if expected.ndim == 3 else expected)
    for row in range(q_len):
        holding = {n for n, call in enumerate(planned.calls) if call.rows.start <= row < call.rows.stop}
        merged = [set(numbers) for rows, numbers in planned.merges if rows.start <= row < rows.stop]
        assert merged == ([holding] if holding else [])


def test_built_in_plans_need_few_calls() -> None:
    most = {"lampe": 4, "self_extend": 2, "rerope": 2, "string": 2, "dca": 18}
    for name, limit in most.items():
        plan = posenc.strategy(name, window=4096, **({"mapping": 3000} if name == "lampe" else {})).plan(16384)
        calls = band_schedule(plan, 16384).calls
        assert len(calls) <= limit, name
        assert all(call.allowed is None for call in calls), name
        assert len(band_schedule(plan, 1).calls) == len(plan.segments), name  # decoding: one slice of keys per segment


def test_a_long_causal_run_is_not_joined_with_a_few_windowed_queries() -> None:
    """Otherwise flash attention would use its slow path for windows on 15,926 queries that have none."""
    plan = posenc.strategy("lampe", window=4096, mapping=3000).plan(16384)
    middle = [call.band for call in band_schedule(plan, 16384).calls if call.query_copy == 1]
    assert [(band.rows, band.left) for band in middle] == [((0, 15926), None), ((15926, 16128), 15925)]


def test_a_sliding_window_is_one_call() -> None:
    plan = posenc.strategy("lm_infinite", window=2048).plan(16384)
    assert [call.band for call in band_schedule(plan, 16384).calls if call.query_copy == 0] == [
        Band((0, 16384), (0, 16384), left=1023, right=0)
    ]


@pytest.mark.parametrize(("rows", "calls"), [(19, 2), (20, 1), (21, 1)])
def test_calls_are_joined_if_windowed_queries_are_at_least_as_many_as_causal_ones(rows: int, calls: int) -> None:
    row = np.arange(20 + rows)
    assert len(bands(np.maximum(row - 19, 0), row + 1)) == calls


def test_a_few_windowed_queries_alone_are_a_window() -> None:
    """They do not become a dense band over all keys of the segment, since nothing else is pooled with them."""
    row = np.arange(1000)
    assert bands(np.maximum(row - 994, 0), row + 1) == [
        Band((0, 995), (0, 995), right=0),
        Band((995, 1000), (1, 1000), left=994, right=0),
    ]
