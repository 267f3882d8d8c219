"""Segment and PositionPlan on their own, compared with dense matrices of the same plan."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import posenc
from posenc.plan import PositionPlan
from posenc.segment import Lengths, Segment

some = settings(deadline=None, max_examples=60)


@st.composite
def random_plans(draw: st.DrawFn) -> PositionPlan:
    """Two to four bands with arbitrary positions, including negative and fractional ones."""
    total = draw(st.integers(1, 40))
    edges = sorted(draw(st.sets(st.integers(1, 45), max_size=3)))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    segments = []
    for number, (near, far) in enumerate(zip([0, *edges], [*edges, None], strict=True)):
        query, key = (random.integers(-50, 50, total) / random.choice([1, 3]) for _ in range(2))
        segments.append(Segment.band(f"part{number}", total, near, far, query, key))
    scale = random.uniform(0.5, 2, total) if draw(st.booleans()) else None
    return PositionPlan.build(Lengths(draw(st.integers(1, total)), total), segments, query_scale=scale)


def farthest(relative: np.ndarray) -> np.ndarray:
    return np.array([np.nanmax(row) if (~np.isnan(row)).any() else -np.inf for row in relative])


@some
@given(total=st.integers(1, 30), near=st.integers(0, 35), width=st.one_of(st.none(), st.integers(0, 35)))
def test_band_is_what_its_docstring_says(total: int, near: int, width: int | None) -> None:
    index = np.arange(total)
    segment = Segment.band("band", total, near, None if width is None else near + width, index, index)
    for i in range(total):
        keys = [j for j in range(i + 1) if near <= i - j and (width is None or i - j < near + width)]
        assert list(range(int(segment.key_start[i]), int(segment.key_stop[i]))) == keys
    assert (np.diff(segment.key_start) >= 0).all()
    assert (np.diff(segment.key_stop) >= 0).all()
    assert segment.key_start.dtype == segment.key_stop.dtype == np.int64
    assert segment.total == total


@some
@given(plan=random_plans())
def test_reach_and_max_relative_equal_the_dense_maximum(plan: PositionPlan) -> None:
    relative = plan.relative_positions()
    np.testing.assert_array_equal(plan.reach, np.maximum.accumulate(farthest(relative)))
    assert plan.max_relative == np.nanmax(relative)
    for segment in plan.segments:
        alone = replace(plan, segments=(segment,)).relative_positions()
        np.testing.assert_array_equal(segment.reach(), farthest(alone))


@some
@given(data=st.data(), plan=random_plans())
def test_prefix_and_suffix_are_corners_of_the_dense_plan(data: st.DataObject, plan: PositionPlan) -> None:
    dense = plan.relative_positions()
    total = data.draw(st.integers(1, plan.total))
    prefix = plan.prefix(total)
    np.testing.assert_array_equal(prefix.relative_positions(), dense[:total, :total])
    start = data.draw(st.integers(0, plan.total - 1))
    suffix = plan.suffix(start)
    np.testing.assert_array_equal(suffix.relative_positions(), dense[start:, start:])
    assert (prefix.total, suffix.total) == (total, plan.total - start)
    assert prefix.prompt == plan.prompt
    if plan.query_scale is not None:
        np.testing.assert_array_equal(prefix.query_scale, plan.query_scale[:total])
        np.testing.assert_array_equal(suffix.query_scale, plan.query_scale[start:])
    for part in (prefix, suffix):
        assert not any(segment.is_empty for segment in part.segments)
        part.check()


def test_a_part_whose_scale_is_all_ones_has_no_scale() -> None:
    plan = posenc.strategy("rerope", window=64, window_size=10).plan(5, 80)
    assert plan.query_scale is not None
    assert plan.prefix(11).query_scale is None
    assert plan.prefix(10).is_identity
    assert plan.prefix(80).query_scale is plan.query_scale
    assert plan.suffix(70).query_scale is not None


@some
@given(plan=random_plans(), sliding_window=st.integers(1, 45))
def test_clipped_drops_exactly_the_far_pairs(plan: PositionPlan, sliding_window: int) -> None:
    clipped = plan.clipped(sliding_window)
    index = np.arange(plan.total)
    expected = np.where(index[:, None] - index < sliding_window, plan.relative_positions(), np.nan)
    np.testing.assert_array_equal(clipped.relative_positions(), expected)
    clipped.check(drops_keys=True)
    if sliding_window < plan.total:
        with pytest.raises(posenc.InvalidInputError, match="no segment"):
            clipped.check()


def test_is_identity_sees_every_deviation() -> None:
    plan = PositionPlan.identity(Lengths(8, 10))
    assert plan.is_identity
    assert plan.keeps_distances
    (segment,) = plan.segments
    index = np.arange(10)
    shifted = replace(segment, query_positions=index + 3, key_positions=index + 3)
    for other in (
        replace(plan, query_scale=np.full(10, 2.0)),
        replace(plan, segments=(shifted,)),
        replace(plan, segments=(replace(segment, key_start=np.maximum(index - 3, 0)),)),
        replace(plan, segments=(replace(segment, key_positions=index // 2),)),
        replace(plan, segments=(replace(segment, query_positions=index[:, None], key_positions=index[:, None]),)),
    ):
        assert not other.is_identity
    assert replace(plan, segments=(shifted,)).keeps_distances
    assert not replace(plan, segments=(replace(segment, key_positions=index // 2),)).keeps_distances
    assert posenc.strategy("streaming_llm", window_size=4, sinks=0).plan(20).keeps_distances
    assert not posenc.strategy("streaming_llm", window_size=4, sinks=1).plan(20).keeps_distances
    assert posenc.strategy("self_extend", group=1, window_size=4).plan(20).keeps_distances


def test_stock_attention_needs_every_key_of_the_window() -> None:
    drops = posenc.strategy("streaming_llm", window_size=4, sinks=0).plan(20)
    assert drops.clipped(4).is_stock(4)
    assert not drops.clipped(5).is_stock(5)
    assert drops.clipped(3).is_stock(3)
    assert not posenc.strategy("streaming_llm", window_size=4, sinks=1).plan(20).clipped(5).is_stock(5)
    assert PositionPlan.identity(Lengths(8, 10)).clipped(3).is_stock(3)
    assert not PositionPlan.identity(Lengths(8, 10)).is_stock(3)
    assert PositionPlan.identity(Lengths(8, 10)).is_stock(None)


def test_build_drops_empty_segments_and_a_scale_of_ones() -> None:
    index = np.arange(4)
    parts = [Segment.band("near", 4, 0, 9, index, index), Segment.band("far", 4, 9, None, index, index)]
    plan = PositionPlan.build(Lengths(4, 4), parts, query_scale=np.ones(4))
    assert [segment.name for segment in plan.segments] == ["near"]
    assert plan.query_scale is None


def two_parts(total: int = 10) -> tuple[PositionPlan, Segment, Segment]:
    plan = posenc.strategy("rerope", window_size=3, log_scale=False).plan(total)
    near, far = plan.segments
    return plan, near, far


def message_of(plan: PositionPlan) -> str:
    with pytest.raises(posenc.InvalidInputError) as caught:
        plan.check()
    return str(caught.value)


def test_check_names_the_pair_and_the_segments() -> None:
    plan, near, far = two_parts()
    plan.check()
    wider = replace(far, key_stop=far.key_stop + (np.arange(10) >= 5))
    assert message_of(replace(plan, segments=(near, wider))) == (
        "pair (i=5, j=3) is attended by segments 'beyond' and 'window'."
    )
    hole = replace(far, key_stop=np.maximum(far.key_stop - (np.arange(10) >= 4), 0))
    assert message_of(replace(plan, segments=(near, hole))) == "pair (i=4, j=1) is attended by no segment."
    assert message_of(replace(plan, segments=(near,))) == "pair (i=3, j=0) is attended by no segment."
    blind = replace(near, key_stop=np.minimum(near.key_stop, 9))
    assert message_of(replace(plan, segments=(blind, far))) == "pair (i=9, j=9) is attended by no segment."
    ahead = replace(near, key_stop=near.key_stop + 1)
    assert message_of(replace(plan, segments=(ahead, far))).startswith("pair (i=0, j=1) lies in the future")
    for bound in ("key_start", "key_stop"):
        falling = replace(near, **{bound: getattr(near, bound)[::-1].copy()})
        assert message_of(replace(plan, segments=(falling, far))) == f"segment 'window': {bound} decreases somewhere."
        short = replace(near, **{bound: getattr(near, bound)[:-1]})
        assert message_of(replace(plan, segments=(short, far))) == (
            f"segment 'window': {bound} must have shape [10], got [9]."
        )
    for which in ("query", "key"):
        cut = replace(near, **{f"{which}_positions": np.arange(9)})
        assert f"{which}_positions must cover 10 tokens" in message_of(replace(plan, segments=(cut, far)))


def test_check_refuses_invalid_positions_and_bounds() -> None:
    plan, near, far = two_parts()
    below = replace(near, key_start=near.key_start - 1)
    assert message_of(replace(plan, segments=(below, far))) == "segment 'window': key_start is negative."
    for value in (np.nan, np.inf):
        lost = replace(far, key_positions=np.where(np.arange(10) == 4, value, 0.0))
        message = "segment 'beyond': key_positions hold a NaN or an infinity."
        assert message_of(replace(plan, segments=(near, lost))) == message


def test_check_refuses_a_plan_without_segments() -> None:
    plan, _, _ = two_parts()
    assert message_of(replace(plan, segments=())) == "pair (i=0, j=0) is attended by no segment."


def test_check_may_allow_dropped_pairs_but_never_future_or_doubled_ones() -> None:
    plan, near, far = two_parts()
    replace(plan, segments=(near,)).check(drops_keys=True)
    ahead = replace(near, key_stop=near.key_stop + 1)
    for broken in ((ahead,), (near, near), (near, replace(far, key_stop=far.key_stop + (np.arange(10) >= 5)))):
        with pytest.raises(posenc.InvalidInputError):
            replace(plan, segments=broken).check(drops_keys=True)


def test_explain_prints_every_segment() -> None:
    strategy = posenc.strategy("lampe", window=1024, head=512, tail=200, mapping=1536)
    text = strategy.plan(2048, 2060).explain()
    lines = text.splitlines()
    assert lines[0] == "lampe: prompt 2048, total 2060, window 1024"
    for name in ("head", "middle", "tail"):
        assert any(line.startswith(f"  {name}") for line in lines)
    assert "logit scale: 1.14343 .. 1.14343" in text
    relative = strategy.plan(2048, 2060).relative_positions()
    assert f"largest relative position: {np.nanmax(relative):g}" in text
    beyond = int((np.nanmax(relative, axis=1) >= 1024).argmax())
    assert f"beyond the window (1024) from query {beyond} on" in text
    rows = [line.split() for line in lines if "->" in line and line.split()[0].isdigit()]
    assert len(rows) >= 10
    for distance, _, value, name in rows:
        assert float(value) == relative[-1, 2059 - int(distance)]
        assert name in ("head", "middle", "tail")


def test_explain_says_which_pairs_are_plain_and_which_are_dropped() -> None:
    plain = posenc.strategy("rope").plan(10).explain()
    assert "identity: plain RoPE" in plain
    assert "unknown window" in plain
    assert "dropped" not in plain
    dropping = posenc.strategy("lm_infinite", window=20, sinks=2).plan(40).explain()
    dropped = np.isnan(posenc.strategy("lm_infinite", window=20, sinks=2).plan(40).relative_positions())
    share = (dropped.sum() - 40 * 39 / 2) / (40 * 41 / 2)
    assert f"dropped      {share:.1%} of all pairs" in dropping
    assert "not attended" in dropping
    assert "inside the window everywhere" in dropping
    assert "dpe" in posenc.strategy("dpe", window=32, scales=[2, 4, 8]).plan(60).explain()


@pytest.mark.parametrize("compat", ["paper", "official"])
def test_a_plan_for_a_million_tokens_stays_small(compat: str) -> None:
    strategy = posenc.strategy("lampe", window=4096, mapping="llama2", compat=compat)
    tracemalloc.start()
    try:
        plan = strategy.plan(1_000_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200e6
    assert [len(segment.key_start) for segment in plan.segments] == [1_000_000] * 3
    assert plan.max_relative < 4096
