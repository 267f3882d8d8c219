"""Layouts, tiles, the merge and the rotation, each alone."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import posenc
from posenc.kernels.cpu import tiles
from posenc.kernels.cpu.calls import flash_calls
from posenc.kernels.cpu.tiles import LEAF, tiles_of
from posenc.kernels.merge import merge
from posenc.kernels.rotated import QueryCopy, rotation_layout
from posenc.plan import PositionPlan
from posenc.testing import attention_by_definition, random_plans
from posenc.testing.generators import interpolating_plan


def intervals(copy: QueryCopy) -> np.ndarray:
    """Return the pairs inside a segment's intervals, bool [rows, keys]."""
    key = np.arange(int(copy.key_stop.max()) + 1)
    return (key >= copy.key_start[:, None]) & (key < copy.key_stop[:, None])


@settings(max_examples=150)
@given(random_plans(), st.floats(0, 1), st.sampled_from([(2, 1, 3), (4, 3, 9), (128, 32, 2048)]))
def test_tiles_cover_every_pair_once(plan: PositionPlan, share: float, sizes: tuple[int, int, int]) -> None:
    q_len = max(1, round(share * plan.total))
    with mock.patch.multiple(tiles, LEAF=sizes[0], BAND_ROWS=sizes[1], WIDE_BAND=sizes[2]):
        check_tiles(plan, q_len)


def check_tiles(plan: PositionPlan, q_len: int) -> None:
    for copy in rotation_layout(plan, q_len).queries:
        rows, inside = len(copy.key_start), intervals(copy)
        covered = np.zeros((rows, int(copy.key_stop.max()) + 1), dtype=int)
        for piece in tiles_of(copy.key_start, copy.key_stop):
            for block in range(piece.count):
                for r in range(*piece.rows):
                    for c in range(*piece.keys):
                        row, key = r + block * piece.step, c + block * piece.step
                        at = (r - piece.rows[0], c - piece.keys[0])
                        attended = {
                            "full": True,
                            "lower": at[1] <= at[0],
                            "masked": inside[row - block * piece.step, key - block * piece.step],
                        }[piece.kind]
                        covered[row, key] += attended
        assert np.array_equal(covered, inside)


def test_built_in_plans_need_few_calls() -> None:
    for name in ("lampe", "self_extend", "rerope", "dca", "string"):
        params = {"mapping": 3000} if name == "lampe" else {}
        plan = posenc.strategy(name, window=4096, **params).plan(16384)
        copies = rotation_layout(plan, 16384).queries
        all_tiles = [tile for copy in copies for tile in tiles_of(copy.key_start, copy.key_stop)]
        assert len(all_tiles) <= 64, name
        assert all(tile.kind != "masked" or tile.rows[1] - tile.rows[0] <= LEAF for tile in all_tiles), name
        assert flash_calls(plan, 16384).complete, name


def test_shifted_keys_share_one_rotated_copy() -> None:
    plan = posenc.strategy("lampe", window=512, mapping=300).plan(2000)
    assert len(plan.segments) == 3
    assert len(rotation_layout(plan, 2000).keys) == 2  # head and tail read the same keys


def test_decoding_rotates_every_key_once() -> None:
    for name in ("lampe", "self_extend", "rerope", "dca", "string"):
        params = {"mapping": 300} if name == "lampe" else {}
        plan = posenc.strategy(name, window=512, **params).plan(2000, 2100)
        copies = rotation_layout(plan, 1).keys
        assert sum(copy.keys.stop - copy.keys.start for copy in copies) == 2100, name


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_a_fractional_shift_is_not_moved_to_interpolated_queries(shift: float) -> None:
    lengths = posenc.Lengths(40, 40)
    index = lengths.indices
    segments = [
        posenc.Segment.band("near", 40, 0, 9, index, index / 8 + shift, "logits"),
        posenc.Segment.band("far", 40, 9, None, index, index / 8, "logits"),
    ]
    plan = PositionPlan.build(lengths, segments)
    assert len(rotation_layout(plan, 40).keys) == (1 if shift == 2.0 else 2)
    q, k, v = torch.randn(3, 1, 2, 40, 8, generator=torch.Generator().manual_seed(0))
    rotary = posenc.Rotary.from_theta(50.0, 8)
    expected, _ = attention_by_definition(q, k, v, plan, rotary)
    assert (posenc.attention(q, k, v, plan, rotary, backend="cpu_flash") - expected).abs().max() < 2e-5


def test_every_part_of_an_interpolating_plan_interpolates() -> None:
    plan = interpolating_plan(300)
    q, k, v = torch.randn(3, 1, 1, 300, 8, generator=torch.Generator().manual_seed(0))
    rotary = posenc.Rotary.from_theta(50.0, 8)
    for part, at in (
        (plan.prefix(70), slice(0, 70)),
        (plan.suffix(250), slice(250, 300)),
        (plan.clipped(9), slice(0, 300)),  # and in blocks: the reference slices longer inputs
    ):
        own = [x[:, :, at] for x in (q, k, v)]
        expected, _ = attention_by_definition(*own, dense_part(plan, part, at), rotary)
        for backend in ("reference", "cpu_flash"):
            assert (posenc.attention(*own, part, rotary, backend=backend) - expected).abs().max() < 2e-5


def dense_part(plan: PositionPlan, part: PositionPlan, at: slice) -> PositionPlan:
    """Return the part with positions and interpolation taken from the whole plan."""
    (whole,), (own,) = plan.segments, part.segments
    positions = (whole.query_positions[at], whole.key_positions[at])
    segment = posenc.Segment("s", own.key_start, own.key_stop, *positions, interpolation="logits")
    return PositionPlan(part.prompt, part.total, (segment,))


def test_equal_fractional_positions_are_not_plain_with_interpolated_logits() -> None:
    index = posenc.Lengths(9, 9).indices
    halves = [posenc.Segment.band("s", 9, 0, None, index + 0.5, index + 0.5, kind) for kind in ("positions", "logits")]
    assert [segment.keeps_distance for segment in halves] == [True, False]


lse_values = st.one_of(st.just(-math.inf), st.floats(-50, 50))


@given(st.lists(st.tuples(lse_values, st.floats(-5, 5)), min_size=3, max_size=3))
def test_merge_is_associative_and_commutative(parts: list[tuple[float, float]]) -> None:
    sides = [
        (torch.full((1, 1, 1, 2), 0.0 if lse == -math.inf else out).double(), torch.full((1, 1, 1), lse).double())
        for lse, out in parts
    ]
    left = merge(*merge(*sides[0], *sides[1]), *sides[2])
    right = merge(*sides[0], *merge(*sides[1], *sides[2]))
    swapped = merge(*merge(*sides[2], *sides[1]), *sides[0])
    for other in (right, swapped):
        assert torch.allclose(left[0], other[0], atol=1e-12)
        assert torch.equal(left[1], other[1]) or torch.allclose(left[1], other[1], atol=1e-12)
    weights = torch.tensor([lse for lse, _ in parts]).double()
    if weights.isfinite().any():
        expected = (
            weights.softmax(0)
            * torch.tensor([out for _, out in parts]).double().where(weights.isfinite(), torch.zeros(()).double())
        ).sum()
        assert torch.allclose(left[0], expected, atol=1e-9)
    else:
        assert bool((left[0] == 0).all())
        assert bool((left[1] == -math.inf).all())


def test_rotation_depends_only_on_the_difference() -> None:
    rotary = posenc.Rotary.from_theta(1e4, 16)
    x, y = torch.randn(2, 1, 1, 1, 16).double()
    dots = []
    for shift in (0, 12345, 1_000_000, -77):
        tables = [rotary.tables(np.array([p + shift]), dtype=torch.float64) for p in (90.5, 31)]
        dots.append((rotary.rotate(x, *tables[0]) * rotary.rotate(y, *tables[1])).sum())
    assert max(dots) - min(dots) < 1e-9


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_stock_rotation_equals_ours(style: str) -> None:
    rotary = posenc.Rotary.from_theta(1e4, 8, style=style, channels=(2, 10), attention_scaling=1.2)
    x = torch.randn(2, 3, 20, 12)
    ids = torch.arange(20).expand(2, -1)
    cos, sin = rotary.tables(np.arange(20))
    assert (rotary.rotate_as_stock(x, ids) - rotary.rotate(x, cos, sin)).abs().max() < 1e-5


def test_bad_rotaries_are_refused() -> None:
    with pytest.raises(posenc.InvalidInputError, match="channels"):
        posenc.Rotary.from_theta(1e4, 8, channels=(0, 6))
    with pytest.raises(posenc.InvalidInputError, match="style"):
        posenc.Rotary(torch.ones(4), style="spiral")  # type: ignore[arg-type]
    with pytest.raises(posenc.InvalidInputError, match="even"):
        posenc.Rotary.from_theta(1e4, 7)
    with pytest.raises(posenc.InvalidInputError, match="vector"):
        posenc.Rotary(torch.ones(2, 2))
    with pytest.raises(posenc.InvalidInputError, match="must hold real numbers"):
        posenc.Rotary(torch.ones(4, dtype=torch.complex64))
    with pytest.raises(posenc.InvalidInputError, match="arithmetic must be 'native' or"):
        posenc.Rotary(torch.ones(4), arithmetic="roman")  # type: ignore[arg-type]
    with pytest.raises(posenc.InvalidInputError, match="attention_scaling must be finite"):
        posenc.Rotary(torch.ones(4), attention_scaling=math.nan)
