"""cpu_flash at lengths where triangles have levels, bands have blocks and heads are split into chunks."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import posenc
from posenc.kernels.cpu import decode_calls, prefill, tiles
from posenc.kernels.cpu.training import attend_with_gradients
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.plan import PositionPlan
from posenc.testing import random_plans
from posenc.testing.layouts import LAYOUTS

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
def test_the_output_is_exact_at_every_tile_size(name: str, leaf: int, band: int, wide: int, q_len: int) -> None:
    q, k, v = qkv(1, q_len)
    with mock.patch.multiple(tiles, LEAF=leaf, BAND_ROWS=band, WIDE_BAND=wide):
        got, lse = posenc.attention(q, k, v, plan_of(name), ROTARY, backend="cpu_flash", return_lse=True)
    expected, exact = posenc.attention(q, k, v, plan_of(name), ROTARY, backend="reference", return_lse=True)
    assert (got - expected).abs().max() < 2e-5
    assert (lse - exact).abs().max() < 2e-5


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads_at_once", [1, 2, 100])
def test_chunks_of_heads_and_rows_are_exact(batch: int, masked: bool, heads_at_once: int) -> None:
    q, k, v = qkv(batch, 300)
    mask = None
    if masked:
        mask = torch.rand(batch, 1, 300, LENGTH) < 0.6
        mask[..., -1, 9:] = False
        mask[0, :, 17] = False  # a query that attends no key
    chunk = heads_at_once * 3 * 300 * 16 * 4
    with mock.patch.multiple(prefill, CHUNK_BYTES=chunk, BLOCK_BYTES=chunk // 3):
        got = posenc.attention(q, k, v, plan_of("lampe"), ROTARY, backend="cpu_flash", mask=mask, return_lse=True)
    expected = posenc.attention(q, k, v, plan_of("lampe"), ROTARY, backend="reference", mask=mask, return_lse=True)
    assert (got[0] - expected[0]).abs().max() < 2e-5
    assert torch.equal(got[1].isinf(), expected[1].isinf())
    assert (got[1] - expected[1]).nan_to_num(0.0).abs().max() < 2e-5


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("wide", [64, 2048])
def test_gradients_of_overlapping_blocks_are_exact(name: str, wide: int) -> None:
    gradients = []
    for backend in ("cpu_flash", "reference"):
        leaves = [x.double().requires_grad_() for x in qkv(2, 300)]
        with mock.patch.multiple(tiles, LEAF=16, BAND_ROWS=8, WIDE_BAND=wide):
            out = posenc.attention(*leaves, plan_of(name), ROTARY, backend=backend)
            (out * torch.linspace(-1, 1, out.numel(), dtype=torch.double).view(out.shape)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*gradients, strict=True):
        assert (got - expected).abs().max() < 1e-9


class NoOverlap(TorchDispatchMode):
    """Fails if an in-place addition writes to one place twice, which is wrong once threads share the work."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add_.Tensor and args[0].ndim == 4:
            target = args[0]
            places = torch.arange(target.untyped_storage().nbytes() // target.element_size())
            written = places.as_strided(target.shape, target.stride(), target.storage_offset())
            assert len(written.unique()) == target.numel()
            self.blocks += target.shape[0] > 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PLANS)
def test_gradients_of_overlapping_blocks_are_not_added_at_once(name: str) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1))
    with mock.patch.multiple(tiles, LEAF=16, BAND_ROWS=8, WIDE_BAND=2048), NoOverlap() as watch:
        posenc.attention(q, k, v, plan_of(name), ROTARY, backend="cpu_flash").sum().backward()
    assert watch.blocks > 0


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("value_dim", [7, 16, 24])
@pytest.mark.parametrize("loss", ["both", "lse", "sum"])
def test_gradients_through_the_logsumexp(name: str, masked: bool, value_dim: int, loss: str) -> None:
    """Also where the output has no gradient, where that is expanded from one number, and beside hidden queries."""
    gradients = []
    mask = torch.rand(2, 1, 150, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6 if masked else None
    if mask is not None:
        mask[0, :, 17] = False
    for backend in ("cpu_flash", "reference"):
        q, k, v = (x.double().requires_grad_() for x in qkv(2, 150))
        wide = torch.cat((v, -v), -1)[..., :value_dim]
        with mock.patch.multiple(tiles, LEAF=16, BAND_ROWS=8, WIDE_BAND=64):
            out, lse = posenc.attention(
                q, k, wide, plan_of(name), ROTARY, backend=backend, mask=mask, return_lse=True, scale=-0.3
            )
        finite = lse.where(lse.isfinite(), 0.0)
        total = {"both": out.square().sum() + finite.square().sum(), "lse": finite.sin().sum(), "sum": out.sum()}[loss]
        gradients.append(torch.autograd.grad(total, (q, k, v), materialize_grads=True))
    for got, expected in zip(*gradients, strict=True):
        assert (got - expected).abs().max() < 1e-6  # the logsumexp itself is float32


def test_the_layout_of_the_gradient_itself() -> None:
    """Slicing the channels passes on a copy; the backward pass does not rely on it."""
    for layout in ("expanded over channels", "with tokens inside of channels"):
        q, k, v = (x.double().requires_grad_() for x in qkv(2, 150))
        out, _ = attend_with_gradients(q, k, v, plan_of("dca"), ROTARY, 0.25, None)
        right = posenc.attention(q, k, v, plan_of("dca"), ROTARY, backend="reference")
        weights = LAYOUTS[layout](torch.linspace(-1, 1, out.numel()).double().view(out.shape))
        gradients = [torch.autograd.grad(x, (q, k, v), weights) for x in (out, right)]
        for got, expected in zip(*gradients, strict=True):
            assert (got - expected).abs().max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_through_the_logsumexp_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    gradients = []
    for backend in ("cpu_flash", "reference"):
        leaves = [x.to(dtype).requires_grad_() for x in qkv(2, 300)]
        out, lse = posenc.attention(*leaves, plan_of("dca"), ROTARY, backend=backend, return_lse=True)
        gradients.append(torch.autograd.grad(out.float().square().sum() + lse.square().sum(), leaves))
    for got, expected in zip(*gradients, strict=True):
        allowed = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert got.dtype == dtype
        assert (got - expected).abs().max() < allowed * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["lampe", "self_extend", "rerope"])
def test_layouts_at_every_kind_of_call(layout: str, name: str) -> None:
    """Tiles of full, triangular and masked blocks, one query in splits, and keys that are not rotated."""
    for q_len in (LENGTH, 9, 1):
        q, k, v = (LAYOUTS[layout](x) for x in qkv(2, q_len))
        expected = posenc.attention(q, k, v, plan_of(name), ROTARY, backend="reference")
        with mock.patch.object(decode_calls, "LEAST_KEYS", 7):
            for kept in (None, RotatedKeyCache()):
                got = posenc.attention(q, k, v, plan_of(name), ROTARY, backend="cpu_flash", kept=kept)
                assert (got - expected).abs().max() < 2e-5


@pytest.mark.parametrize("scale", [0.0, -0.25, -3.0])
@pytest.mark.parametrize("name", PLANS)
def test_scales_of_zero_and_below_are_exact(scale: float, name: str) -> None:
    for q_len in (LENGTH, 1):
        q, k, v = qkv(1, q_len)
        got = posenc.attention(q, k, v, plan_of(name), ROTARY, backend="cpu_flash", scale=scale, return_lse=True)
        right = posenc.attention(q, k, v, plan_of(name), ROTARY, backend="reference", scale=scale, return_lse=True)
        for own, expected in zip(got, right, strict=True):
            assert (own - expected).abs().max() < 2e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["lampe", "rope"])
def test_one_query_in_splits_is_exact(threads: int, batch: int, name: str) -> None:
    plan = posenc.strategy("rope").plan(LENGTH) if name == "rope" else plan_of(name)
    before = torch.get_num_threads()
    q, k, v = qkv(batch, 1)
    try:
        torch.set_num_threads(threads)
        with mock.patch.object(decode_calls, "LEAST_KEYS", 7):
            got = posenc.attention(q, k, v, plan, ROTARY, backend="cpu_flash", return_lse=True)
    finally:
        torch.set_num_threads(before)
    expected = posenc.attention(q, k, v, plan, ROTARY, backend="reference", return_lse=True)
    for mine, exact in zip(got, expected, strict=True):
        assert (mine - exact).abs().max() < 2e-5


@settings(max_examples=80, deadline=None)
@given(random_plans(frequencies=8, interpolated=True), st.integers(0, 40), st.booleans())
def test_short_segments_computed_with_a_neighbour_are_exact(plan: PositionPlan, few: int, whole: bool) -> None:
    q, k, v = (torch.randn(1, 2, n, 20, generator=torch.Generator().manual_seed(n)).double() for n in (1, 70, 71))
    k, v = k[:, :, : plan.total], v[:, :, : plan.total]
    rotary = posenc.Rotary.from_theta(50.0, 16, channels=(2, 18))
    if whole:
        q, k, v = q[..., :16], k[..., :16], v[..., :16]
        rotary = posenc.Rotary.from_theta(50.0, 16, style="interleaved")
    expected = posenc.attention(q, k, v, plan, rotary, backend="reference", return_lse=True)
    kept = RotatedKeyCache()
    with mock.patch.object(decode_calls, "GRAIN", few * k.shape[1] * k.shape[3]):
        for own in (None, kept, kept):
            got = posenc.attention(q, k, v, plan, rotary, backend="cpu_flash", return_lse=True, kept=own)
            plan._derived.clear()
            for mine, exact in zip(got, expected, strict=True):
                assert (mine - exact).nan_to_num(0.0).abs().max() < 1e-9
