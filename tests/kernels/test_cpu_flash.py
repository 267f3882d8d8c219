"""cpu_flash at lengths where triangles have levels, bands have blocks and heads come in chunks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import posenc
from posenc.kernels import cpu_flash, one_query, tiles
from posenc.kernels.kept import KeptKeys
from posenc.plan import PositionPlan
from posenc.testing import random_plans

LENGTH = 700
PLANS = {
    "lampe": {"mapping": 90, "head": 40, "tail": 20},
    "self_extend": {"group": 8, "window_size": 70},
    "rerope": {"window_size": 50},
    "dca": {"chunk_size": 150, "local_size": 30},
    "string": {"shift": 200, "window_size": 30},
    "lm_infinite": {"window_size": 60, "sinks": 5},
}
ROTARY = posenc.Rotary.from_theta(1e4, 16)


def plan_of(name: str) -> PositionPlan:
    return posenc.strategy(name, window=256, **PLANS[name]).plan(LENGTH)


def qkv(batch: int, q_len: int = LENGTH) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, heads, tokens, 16) for heads, tokens in ((6, q_len), (2, LENGTH), (2, LENGTH))]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("leaf", "band", "wide"), [(16, 8, 64), (128, 32, 2048)])
@pytest.mark.parametrize("q_len", [LENGTH, 333])
def test_output_at_every_size_of_tile(name: str, leaf: int, band: int, wide: int, q_len: int) -> None:
    q, k, v = qkv(1, q_len)
    with mock.patch.multiple(tiles, LEAF=leaf, BAND_ROWS=band, WIDE_BAND=wide):
        got, lse = posenc.attention(q, k, v, plan_of(name), ROTARY, backend="cpu_flash", return_lse=True)
    expected, exact = posenc.attention(q, k, v, plan_of(name), ROTARY, backend="reference", return_lse=True)
    assert (got - expected).abs().max() < 2e-5
    assert (lse - exact).abs().max() < 2e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads_at_once", [1, 2, 100])
def test_chunks_of_heads_and_rows(batch: int, masked: bool, heads_at_once: int) -> None:
    q, k, v = qkv(batch, 300)
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 300, LENGTH) < 0.6
        mask[..., -1, 9:] = False
        mask[0, :, 17] = False  # a query that attends nothing
    chunk = heads_at_once * 3 * 300 * 16 * 4
    with mock.patch.multiple(cpu_flash, CHUNK_BYTES=chunk, BLOCK_BYTES=chunk // 3):
        got = posenc.attention(q, k, v, plan_of("lampe"), ROTARY, backend="cpu_flash", mask=mask, return_lse=True)
    expected = posenc.attention(q, k, v, plan_of("lampe"), ROTARY, backend="reference", mask=mask, return_lse=True)
    assert (got[0] - expected[0]).abs().max() < 2e-5
    assert torch.equal(got[1].isinf(), expected[1].isinf())
    assert (got[1] - expected[1]).nan_to_num(0.0).abs().max() < 2e-5


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("wide", [64, 2048])
def test_gradients_of_overlapping_blocks(name: str, wide: int) -> None:
    gradients = []
    for backend in ("cpu_flash", "reference"):
        leaves = [x.double().requires_grad_() for x in qkv(2, 300)]
        with mock.patch.multiple(tiles, LEAF=16, BAND_ROWS=8, WIDE_BAND=wide):
            out = posenc.attention(*leaves, plan_of(name), ROTARY, backend=backend)
            (out * torch.linspace(-1, 1, out.numel(), dtype=torch.double).view(out.shape)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*gradients, strict=True):
        assert (got - expected).abs().max() < 1e-9


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["lampe", "rope"])
def test_one_query_in_pieces(threads: int, batch: int, name: str) -> None:
    plan = posenc.strategy("rope").plan(LENGTH) if name == "rope" else plan_of(name)
    before = torch.get_num_threads()
    q, k, v = qkv(batch, 1)
    try:
        torch.set_num_threads(threads)
        with mock.patch.object(one_query, "LEAST_KEYS", 7):
            got = posenc.attention(q, k, v, plan, ROTARY, backend="cpu_flash", return_lse=True)
    finally:
        torch.set_num_threads(before)
    expected = posenc.attention(q, k, v, plan, ROTARY, backend="reference", return_lse=True)
    for mine, exact in zip(got, expected, strict=True):
        assert (mine - exact).abs().max() < 2e-5


@settings(max_examples=80, deadline=None)
@given(random_plans(frequencies=8, interpolated=True), st.integers(0, 40), st.booleans())
def test_short_segments_read_with_a_neighbour(plan: PositionPlan, few: int, whole: bool) -> None:
    q, k, v = (torch.randn(1, 2, n, 20, generator=torch.Generator().manual_seed(n)).double() for n in (1, 70, 71))
    k, v = k[:, :, : plan.total], v[:, :, : plan.total]
    rotary = posenc.Rotary.from_theta(50.0, 16, channels=(2, 18))
    if whole:
        q, k, v = q[..., :16], k[..., :16], v[..., :16]
        rotary = posenc.Rotary.from_theta(50.0, 16, style="interleaved")
    expected = posenc.attention(q, k, v, plan, rotary, backend="reference", return_lse=True)
    kept = KeptKeys()
    with mock.patch.object(one_query, "GRAIN", few * k.shape[1] * k.shape[3]):
        for own in (None, kept, kept):
            got = posenc.attention(q, k, v, plan, rotary, backend="cpu_flash", return_lse=True, kept=own)
            plan.memo.clear()
            for mine, exact in zip(got, expected, strict=True):
                assert (mine - exact).nan_to_num(0.0).abs().max() < 1e-9
