"""The five invariants of a plan, for every registered strategy, third-party ones included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import posenc
from posenc.plan import PositionPlan
from posenc.positions import PositionStrategy, RemapParams

NAMES = list(posenc.strategies())
REMAPPING = [name for name in NAMES if issubclass(posenc.strategies()[name].params, RemapParams)]
windows = st.integers(min_value=16, max_value=96)
prompts = st.integers(min_value=1, max_value=150)
extras = st.integers(min_value=0, max_value=40)
few = settings(deadline=None, max_examples=25)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    import logging

    logging.getLogger("posenc").setLevel(logging.ERROR)


def owners(plan: PositionPlan) -> np.ndarray:
    """How many segments attend each pair, counted one pair at a time."""
    count = np.zeros((plan.total, plan.total), dtype=int)
    for segment in plan.segments:
        for i in range(plan.total):
            for j in range(int(segment.key_start[i]), int(segment.key_stop[i])):
                count[i, j] += 1
    return count


def scale_of(plan: PositionPlan) -> np.ndarray:
    return np.ones(plan.total) if plan.query_scale is None else plan.query_scale


@pytest.mark.parametrize("name", NAMES)
@few
@given(window=windows, prompt=prompts, extra=extras)
def test_segments_partition_the_causal_plane(name: str, window: int, prompt: int, extra: int) -> None:
    drops = posenc.strategies()[name].capabilities.drops_keys
    plan = posenc.strategy(name, window=window).plan(prompt, prompt + extra)
    plan.check(drops_keys=drops)
    count = owners(plan)
    causal = np.tri(plan.total, dtype=int)
    if drops:
        assert (count <= causal).all()
        assert (np.diag(count) == 1).all()  # a query always sees itself
    else:
        assert (count == causal).all()
    relative = plan.relative_positions()
    known = ~np.isnan(relative if relative.ndim == 2 else relative[..., 0])
    assert (known == count.astype(bool)).all()


@pytest.mark.parametrize("name", NAMES)
@few
@given(window=windows, prompt=prompts, extra=extras)
def test_order_is_kept_by_those_that_promise_it(name: str, window: int, prompt: int, extra: int) -> None:
    strategy = posenc.strategy(name, window=window)
    relative = strategy.plan(prompt, prompt + extra).relative_positions()
    relative = relative if relative.ndim == 3 else relative[..., None]
    assert np.nanmin(relative) >= 0
    if not strategy.capabilities.monotone:
        return
    for row in relative:
        by_distance = row[~np.isnan(row[:, 0])][::-1]
        assert (np.diff(by_distance, axis=0) >= -1e-9).all()


@pytest.mark.parametrize("name", NAMES)
@few
@given(window=windows, prompt=prompts, extra=extras)
def test_range_is_reported_and_kept(name: str, window: int, prompt: int, extra: int) -> None:
    strategy = posenc.strategy(name, window=window)
    plan = strategy.plan(prompt, prompt + extra)
    relative = plan.relative_positions()
    assert plan.max_relative == np.nanmax(relative)
    farthest = np.nanmax(relative.reshape(plan.total, -1), axis=1)
    assert (plan.reach == np.maximum.accumulate(farthest)).all()
    at_prompt = min(prompt, window**2 // 8)
    if strategy.capabilities.bounded:
        assert strategy.plan(at_prompt).max_relative < window


@pytest.mark.parametrize("name", NAMES)
@few
@given(window=windows, prompt=prompts, extra=extras, data=st.data())
def test_prefill_equals_decode(name: str, window: int, prompt: int, extra: int, data: st.DataObject) -> None:
    strategy = posenc.strategy(name, window=window)
    shorter = prompt + data.draw(st.integers(0, extra), label="generated")
    full, step = strategy.plan(prompt, prompt + extra), strategy.plan(prompt, shorter)
    expected = full.relative_positions()[:shorter, :shorter]
    found = step.relative_positions()
    if found.ndim != expected.ndim:  # a segment that holds per-frequency positions may not have begun yet
        found, expected = (a if a.ndim == 3 else a[..., None] for a in (found, expected))
        found, expected = np.broadcast_arrays(found, expected)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(scale_of(step), scale_of(full)[:shorter])
    np.testing.assert_array_equal(scale_of(full.prefix(shorter)), scale_of(step))
    assert len(full.prefix(shorter).segments) == len(step.segments)


@pytest.mark.parametrize("name", NAMES)
@few
@given(window=windows, prompt=prompts, extra=extras)
def test_plans_that_use_no_prompt_say_so(name: str, window: int, prompt: int, extra: int) -> None:
    strategy = posenc.strategy(name, window=window)
    if strategy.capabilities.uses_prompt:
        return
    decoded, read = strategy.plan(prompt, prompt + extra), strategy.plan(prompt + extra)
    np.testing.assert_array_equal(decoded.relative_positions(), read.relative_positions())
    np.testing.assert_array_equal(scale_of(decoded), scale_of(read))


def assert_plain(plan: PositionPlan) -> None:
    (segment,) = plan.segments
    index = np.arange(plan.total)
    assert plan.is_identity
    assert plan.query_scale is None
    assert not segment.key_start.any()
    np.testing.assert_array_equal(segment.key_stop, index + 1)
    np.testing.assert_array_equal(segment.query_positions, index)
    np.testing.assert_array_equal(segment.key_positions, index)


@pytest.mark.parametrize("name", REMAPPING)
@few
@given(window=windows, prompt=prompts, extra=extras)
def test_active_from_gives_the_identity(name: str, window: int, prompt: int, extra: int) -> None:
    idle: PositionStrategy = posenc.strategy(name, window=window, active_from=prompt)
    assert_plain(idle.plan(prompt, prompt + extra))
    usual = posenc.strategy(name, window=window).plan(prompt + 1, prompt + 1 + extra)
    found = idle.plan(prompt + 1, prompt + 1 + extra)
    np.testing.assert_array_equal(found.relative_positions(), usual.relative_positions())


# The largest prompt each strategy leaves alone at window 64, from the specification's table.
INACTIVE_AT_64 = {
    "self_extend": 16,
    "rerope": 8,
    "leaky_rerope": 8,
    "dca": 40,
    "string": 21,
    "lm_infinite": 32,
    "streaming_llm": 36,
    "dpe": 8,
    "lampe": 7,
}


@pytest.mark.parametrize("name", sorted(INACTIVE_AT_64))
def test_short_prompts_are_left_alone(name: str) -> None:
    strategy, last = posenc.strategy(name, window=64), INACTIVE_AT_64[name]
    for prompt in range(1, last + 1):
        assert_plain(strategy.plan(prompt))
    assert not strategy.plan(last + 1).is_identity


@pytest.mark.parametrize("name", [name for name in NAMES if name not in REMAPPING])
def test_frequency_strategies_keep_positions(name: str) -> None:
    strategy = posenc.strategy(name, window=64)
    assert strategy.capabilities.changes_frequencies
    assert_plain(strategy.plan(200, 210))


def test_capabilities_are_used_by_the_built_ins() -> None:
    """A promise nobody breaks is untested: some built-in must break each one."""
    by_name = {name: posenc.strategies()[name].capabilities for name in NAMES}
    assert {name for name, c in by_name.items() if not c.monotone} >= {"dca", "string"}
    assert {name for name, c in by_name.items() if c.drops_keys} >= {"lm_infinite", "streaming_llm"}
    for name in ("dca", "string"):
        relative = posenc.strategy(name, window=450).plan(500).relative_positions()
        assert any((np.diff(row[~np.isnan(row)][::-1]) < 0).any() for row in relative)
    for name, capabilities in by_name.items():
        if name in INACTIVE_AT_64 and not capabilities.bounded:
            assert posenc.strategy(name, window=64).plan(1500).max_relative >= 64
