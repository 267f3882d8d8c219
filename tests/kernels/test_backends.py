"""Backends against the definition and against the float64 reference: every shape, dtype and gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import posenc
from posenc.plan import Lengths, PositionPlan, Segment
from tests.kernels.cases import by_definition, plans

FP32, BF16, GRADIENT = 2e-5, 1e-2, 1e-4


def tensors(
    total: int,
    q_len: int,
    heads: tuple[int, int] = (4, 2),
    dim: int = 8,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(batch, h, n, dim, generator=generator).to(dtype)
        for h, n in ((heads[0], q_len), (heads[1], total), (heads[1], total))
    )


def run(backend: str, *args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    return posenc.attention(*args, backend=backend, return_lse=True, **kwargs)  # type: ignore[arg-type, return-value]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    a, b = (torch.nan_to_num(x.double(), nan=1e9, neginf=-1e6) for x in (a, b))
    return bool((a - b).abs().max() <= tolerance)


@settings(max_examples=25)
@given(plans(max_total=14), st.integers(0, 13), st.booleans())
def test_reference_is_the_definition(plan: PositionPlan, cut: int, masked: bool) -> None:
    q_len = max(1, plan.total - cut)
    q, k, v = tensors(plan.total, q_len, dim=4, batch=1)
    rotary = posenc.Rotary.from_theta(50.0, 4)
    mask = torch.rand(1, 1, q_len, plan.total, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    expected = by_definition(q, k, v, plan, rotary.inv_freq, 0.7, mask)
    out, lse = run("reference", q, k, v, plan, rotary, scale=0.7, mask=mask)
    assert close(out, expected[0], 1e-6)
    assert close(lse, expected[1], 1e-5)


@settings(max_examples=80)
@given(
    plans(),
    st.floats(0, 1),
    st.sampled_from([(4, 4), (6, 2), (8, 1), (3, 3)]),
    st.booleans(),
    st.integers(0, 3),
)
def test_cpu_flash_is_the_reference(
    plan: PositionPlan, share: float, heads: tuple[int, int], masked: bool, seed: int
) -> None:
    q_len = max(1, round(share * plan.total))
    q, k, v = tensors(plan.total, q_len, heads, seed=seed)
    rotary = posenc.Rotary.from_theta(1e3, 8, attention_scaling=1.1)
    mask = torch.rand(2, 1, q_len, plan.total, generator=torch.Generator().manual_seed(seed)) < 0.4 if masked else None
    expected = run("reference", q, k, v, plan, rotary, mask=mask)
    got = run("cpu_flash", q, k, v, plan, rotary, mask=mask)
    assert close(got[0], expected[0], FP32)
    assert close(got[1], expected[1], FP32)
    assert got[1].dtype == torch.float32


@settings(max_examples=25)
@given(plans(max_total=40), st.floats(0, 1), st.booleans())
def test_cpu_flash_gradients(plan: PositionPlan, share: float, masked: bool) -> None:
    q_len = max(1, round(share * plan.total))
    leaves = [x.requires_grad_() for x in tensors(plan.total, q_len, (4, 2))]
    rotary = posenc.Rotary.from_theta(1e3, 8)
    mask = torch.rand(2, 1, q_len, plan.total, generator=torch.Generator().manual_seed(2)) < 0.5 if masked else None
    grads = []
    for backend in ("reference", "cpu_flash"):
        out, _ = run(backend, *leaves, plan, rotary, mask=mask)
        grads.append(torch.autograd.grad((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum(), leaves))
    for got, expected in zip(grads[1], grads[0], strict=True):
        assert close(got, expected, GRADIENT)


@pytest.mark.parametrize("name", sorted(posenc.strategies()))
@pytest.mark.parametrize("q_len", [300, 77, 1])
def test_every_strategy_at_length(name: str, q_len: int) -> None:
    params = {"longrope": {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16}}.get(name, {})
    if posenc.strategies()[name].params.model_fields.get("factor", None) is not None and name != "leaky_rerope":
        params = {"factor": 4}
    plan = posenc.strategy(name, window=128, **params).plan(280, 300)
    q, k, v = tensors(300, q_len, (6, 2), dim=32, batch=1)
    rotary = posenc.Rotary.from_theta(1e4, 32)
    expected = run("reference", q, k, v, plan, rotary)
    got = run("cpu_flash", q, k, v, plan, rotary)
    assert close(got[0], expected[0], FP32)
    assert close(got[1], expected[1], FP32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, BF16), (torch.float16, 5e-3), (torch.float64, 1e-9)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    plan = posenc.strategy("lampe", window=64, mapping=40, head=8, tail=5).plan(150)
    q, k, v = tensors(150, 150, dim=16, dtype=dtype)
    rotary = posenc.Rotary.from_theta(1e4, 16)
    expected = run("reference", q.double(), k.double(), v.double(), plan, rotary)
    for backend in ("reference", "cpu_flash"):
        out, _ = run(backend, q, k, v, plan, rotary)
        assert out.dtype == dtype
        assert close(out, expected[0], tolerance)


def test_one_plan_per_row() -> None:
    strategy = posenc.strategy("rerope", window=64, window_size=7)
    per_row = [strategy.plan(p, 50) for p in (50, 20)] + [posenc.strategy("rope").plan(50)]
    q, k, v = tensors(50, 20, batch=3)
    rotary = posenc.Rotary.from_theta(1e4, 8)
    out, lse = run("cpu_flash", q, k, v, per_row, rotary)
    for row, plan in enumerate(per_row):
        rows = slice(row, row + 1)
        expected = run("reference", q[rows], k[rows], v[rows], plan, rotary)
        assert close(out[rows], expected[0], FP32)
        assert close(lse[rows], expected[1], FP32)


def test_value_width_and_partial_rotation() -> None:
    plan = posenc.strategy("self_extend", window=64, group=3, window_size=9).plan(60)
    q, k, _ = tensors(60, 60, dim=12)
    for width in (6, 12, 20):
        v = torch.randn(2, 2, 60, width)
        for channels, style in (((0, 8), "half"), ((4, 12), "interleaved")):
            rotary = posenc.Rotary.from_theta(1e3, 8, channels=channels, style=style)
            expected = run("reference", q, k, v, plan, rotary)
            got = run("cpu_flash", q, k, v, plan, rotary)
            assert got[0].shape == (2, 4, 60, width)
            assert close(got[0], expected[0], FP32)


def test_positions_per_frequency() -> None:
    lengths = Lengths(40, 40)
    index = lengths.indices
    scales = np.array([1, 2, 4, 8])
    grouped = index[:, None] // scales
    plan = PositionPlan.build(
        lengths,
        [
            Segment.band("near", 40, 0, 10, index, index),
            Segment.band("far", 40, 10, None, grouped + 10 - 10 // scales, grouped),
        ],
    )
    q, k, v = tensors(40, 40)
    rotary = posenc.Rotary.from_theta(1e3, 8)
    assert close(run("cpu_flash", q, k, v, plan, rotary)[0], run("reference", q, k, v, plan, rotary)[0], FP32)
    assert plan.relative_positions().shape == (40, 40, 4)


def test_rows_that_attend_nothing() -> None:
    lengths = Lengths(6, 6)
    index = lengths.indices
    starved = PositionPlan.build(lengths, [Segment("late", index * 0, np.maximum(index - 2, 0), index, index)])
    q, k, v = (x.requires_grad_() for x in tensors(6, 6))
    rotary = posenc.Rotary.from_theta(1e3, 8)
    for backend in ("reference", "cpu_flash"):
        out, lse = run(backend, q, k, v, starved, rotary)
        assert bool((out[:, :, :3] == 0).all())
        assert bool((lse[:, :, :3] == -math.inf).all())
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), (q, k, v)))
    blocked = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    out, lse = run("cpu_flash", q, k, v, posenc.strategy("rope").plan(6), rotary, mask=blocked)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())


def test_no_square_of_the_length_is_allocated() -> None:
    length, largest = 2048, 0
    plan = posenc.strategy("lampe", window=512, mapping=384).plan(length)
    q, k, v = tensors(length, length, (1, 1), dim=8, batch=1)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple) else (result,):
                if isinstance(item, torch.Tensor):
                    largest = max(largest, item.untyped_storage().nbytes() // item.element_size())
            return result

    with Watch(), torch.no_grad():
        posenc.attention(q, k, v, plan, posenc.Rotary.from_theta(1e4, 8), backend="cpu_flash")
    assert 0 < largest <= 8 * length * 8  # a few copies of [L, D], nowhere near L * L


def test_nan_stays_in_its_batch_row() -> None:
    plan = posenc.strategy("rerope", window=64, window_size=7).plan(40)
    q, k, v = tensors(40, 40)
    rotary = posenc.Rotary.from_theta(1e4, 8)
    for backend in ("reference", "cpu_flash"):
        clean, _ = run(backend, q, k, v, plan, rotary)
        k_bad = k.clone()
        k_bad[0, 0, 3] = math.nan
        out, _ = run(backend, q, k_bad, v, plan, rotary)
        assert bool(out[0].isnan().any())
        assert torch.equal(out[1], clean[1])


def test_float16_overflow_is_an_error() -> None:
    plan = posenc.strategy("rope").plan(9)
    q, k, v = tensors(9, 9, dtype=torch.float16)
    k[0, 0, 5] = 60000.0
    with pytest.raises(posenc.BackendError, match=r"float16 overflow.*bfloat16"):
        run("cpu_flash", q, k, v, plan, posenc.Rotary.from_theta(1e4, 8))


@pytest.mark.parametrize("rows", [3, 256])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks_follow_the_definition(
    rows: int, softcap: float | None, sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posenc.kernels.reference.ROWS", rows)
    plan = posenc.strategy("rerope", window=64, window_size=4).plan(11)
    rotary = posenc.Rotary.from_theta(1e4, 8)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(2, heads, 11, 8, generator=generator).double() for heads in (4, 2, 2))
    sink_H = torch.tensor([0.5, -1.0, 30.0, 0.0], dtype=torch.double) if sinks else None
    relative = torch.from_numpy(plan.relative_positions().copy())
    first, second = (x.repeat_interleave(4 // x.shape[1], 1).chunk(2, -1) for x in (q, k))
    q_c, k_c = torch.complex(*first), torch.complex(*second)
    turn = torch.polar(torch.ones(()).double(), torch.nan_to_num(relative)[..., None] * rotary.inv_freq.double())
    logits = torch.einsum("bhif,bhjf,ijf->bhij", q_c, k_c.conj(), turn).real * 8**-0.5
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(relative.isnan(), float("-inf"))
    if sink_H is not None:
        logits = torch.cat((logits, sink_H[None, :, None, None].expand(2, -1, 11, 1)), -1)
    expected = logits.softmax(-1)[..., :11] @ v.repeat_interleave(2, 1)
    lse = logits.logsumexp(-1)
    for backend in ("auto", "reference"):
        got, got_lse = posenc.attention(
            q, k, v, plan, rotary, backend=backend, softcap=softcap, sinks=sink_H, return_lse=True
        )
        assert torch.allclose(got, expected, atol=1e-6)
        assert torch.allclose(got_lse.double(), lse, atol=1e-5)


def test_softcap_needs_a_backend_that_computes_it() -> None:
    plan, rotary = posenc.strategy("rope").plan(4), posenc.Rotary.from_theta(1e4, 8)
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(posenc.BackendError, match="computes no softcap"):
        posenc.attention(q, q, q, plan, rotary, backend="cpu_flash", softcap=30.0)


def test_gradients_through_sinks_are_exact() -> None:
    plan, rotary = posenc.strategy("rerope", window=64, window_size=4).plan(7), posenc.Rotary.from_theta(1e4, 8)
    q, k, v = (torch.randn(1, 2, 7, 8, dtype=torch.double, requires_grad=True) for _ in range(3))
    sink = torch.tensor([0.5, -1.0], dtype=torch.double, requires_grad=True)
    with pytest.raises(posenc.BackendError, match="attention sinks"):
        posenc.attention(q, k, v, plan, rotary, backend="cpu_flash", sinks=sink)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        out = posenc.attention(*tensors[:3], plan, rotary, sinks=tensors[3])
        assert isinstance(out, torch.Tensor)
        return out

    assert torch.autograd.gradcheck(run, (q, k, v, sink), atol=1e-3, eps=3e-3)
