"""Properties of backends that the public contract (tests/contract) does not require of all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import posenc
from posenc.kernels.devices import capturing
from posenc.kernels.reference import ReferenceBackend
from posenc.kernels.rotated import checked
from posenc.plan import PositionPlan
from posenc.testing.tensors import AttentionCall, check_result, installed, tensors

ROTARY = posenc.Rotary.from_theta(1e4, 8)


def test_rows_may_have_their_own_plans() -> None:
    strategy = posenc.strategy("rerope", window=64, window_size=7)
    per_row = [strategy.plan(p, 50) for p in (50, 20)] + [posenc.strategy("rope").plan(50)]
    q, k, v = tensors(per_row[0], 20, (4, 2), 8, batch=3)
    out, lse = posenc.attention(q, k, v, per_row, ROTARY, backend="cpu_flash", return_lse=True)
    for row, plan in enumerate(per_row):
        rows = slice(row, row + 1)
        call = AttentionCall(q[rows], k[rows], v[rows], plan, ROTARY, 8**-0.5)
        check_result(f"row {row}", call, out[rows], lse[rows], 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_half_precision_is_close_on_a_long_plan(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    """The tolerance is tighter than in the contract, whose short random plans average over fewer keys."""
    plan = posenc.strategy("lampe", window=64, mapping=40, head=8, tail=5).plan(150)
    q, k, v = tensors(plan, 150, (4, 2), 16, dtype=dtype)
    call = AttentionCall(q, k, v, plan, posenc.Rotary.from_theta(1e4, 16), 0.25)
    out, _ = call.run(backend)
    assert (out.double() - call.expected()[0]).abs().max() <= tolerance


def test_no_square_of_the_length_is_allocated() -> None:
    length, largest = 2048, 0
    plan = posenc.strategy("lampe", window=512, mapping=384).plan(length)
    q, k, v = tensors(plan, length, (1, 1), 8, batch=1)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for item in result if isinstance(result, tuple) else (result,):
                if isinstance(item, torch.Tensor):
                    largest = max(largest, item.untyped_storage().nbytes() // item.element_size())
            return result

    with Watch(), torch.no_grad():
        posenc.attention(q, k, v, plan, ROTARY, backend="cpu_flash")
    assert 0 < largest <= 8 * length * 8  # a few copies of [L, D], far below L * L


def test_float16_overflow_is_an_error() -> None:
    plan: PositionPlan = posenc.strategy("rope").plan(9)
    q, k, v = tensors(plan, 9, (4, 2), 8, dtype=torch.float16)
    k[0, 0, 5] = 60000.0
    with pytest.raises(posenc.BackendError, match=r"float16 overflow.*bfloat16"):
        posenc.attention(q, k, v, plan, ROTARY, backend="cpu_flash")


def test_nothing_waits_for_the_gpu_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    rotated, source = torch.tensor([torch.inf], dtype=torch.float16), torch.ones(1, dtype=torch.float16)
    with monkeypatch.context() as patched:
        patched.setattr("posenc.kernels.rotated.capturing", lambda device: device == rotated.device)
        patched.setattr(torch.Tensor, "__bool__", lambda x: pytest.fail("the GPU was waited for"))
        assert checked(rotated, source, "key") is rotated
    with pytest.raises(posenc.BackendError, match="float16 overflow"):
        checked(rotated, source, "key")


def test_the_stream_decides_whether_it_is_capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=answer: answer)
        assert capturing(torch.device("cuda", 0)) is answer
        assert not capturing(torch.device("cpu"))


@pytest.mark.parametrize(("value", "waits"), [(1.0, 1), (torch.nan, 2)])
def test_finite_rotations_cause_one_wait(value: float, waits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    true = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: asked.append(true(x)) or asked[-1])
    x = torch.tensor([value], dtype=torch.float16)
    assert checked(x, x, "query") is x
    assert len(asked) == waits


@pytest.mark.parametrize("rows", [3, 256])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks_equal_the_definition(
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


def test_a_softcap_is_refused_by_backends_without_one() -> None:
    plan, rotary = posenc.strategy("rope").plan(4), posenc.Rotary.from_theta(1e4, 8)
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(posenc.BackendError, match="computes no softcap"):
        posenc.attention(q, q, q, plan, rotary, backend="cpu_flash", softcap=30.0)


def test_gradients_through_sinks_are_exact() -> None:
    plan, rotary = posenc.strategy("rerope", window=64, window_size=4).plan(7), posenc.Rotary.from_theta(1e4, 8)
    q, k, v = (torch.randn(1, 2, 7, 8, dtype=torch.double, requires_grad=True) for _ in range(3))
    sink = torch.tensor([0.5, -1.0], dtype=torch.double, requires_grad=True)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        out = posenc.attention(*tensors[:3], plan, rotary, sinks=tensors[3])
        assert isinstance(out, torch.Tensor)
        return out

    assert torch.autograd.gradcheck(run, (q, k, v, sink), atol=1e-3, eps=3e-3)


class WithoutLseGradients(ReferenceBackend):
    """Its output has gradients and its logsumexp has none, as where calls of a kernel are merged by logsumexp."""

    name = "without_lse_gradients"
    capabilities = replace(ReferenceBackend.capabilities, lse_gradients=False)
    priority = 1000

    def attend(self, *args: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().attend(*args, **options)
        return out, lse.detach()


def test_a_logsumexp_without_gradients_is_never_returned() -> None:
    plan = posenc.strategy("rerope", window=64, window_size=4).plan(7)
    q, k, v = (torch.randn(1, 2, 7, 8, dtype=torch.double, requires_grad=True) for _ in range(3))
    backend = WithoutLseGradients()
    with installed(backend) as name:
        for given, options, reason in (
            ((q, k, v), {"return_lse": True}, "return_lse=True"),
            ((q.detach(), k, v.detach()), {"return_lse": True}, "return_lse=True"),
            ((q, k, v), {"sinks": torch.zeros(2)}, "attention sinks"),
        ):
            with pytest.raises(posenc.BackendError, match=f"cannot run this case: it has no .*{reason}"):
                posenc.attention(*given, plan, ROTARY, backend=name, **options)  # type: ignore[arg-type]
        out, lse = posenc.attention(q, k, v, plan, ROTARY, return_lse=True)  # auto takes another backend
        expected = posenc.attention(q, k, v, plan, ROTARY, return_lse=True, backend="reference")
        grads = [torch.autograd.grad(o.sum() + x.sum(), (q, k)) for o, x in ((out, lse), expected)]
        for own, right in zip(*grads, strict=True):
            assert (own - right).abs().max() < 1e-6
        with mock.patch.object(backend, "attend", side_effect=AssertionError("it was chosen")):
            for free in ((q, k, v), (q.detach(), k.detach(), v)):  # no logsumexp, or one that depends on no leaf
                with pytest.raises(AssertionError, match="chosen"):
                    posenc.attention(*free, plan, ROTARY, return_lse=free[0] is not q)
            with torch.no_grad(), pytest.raises(AssertionError, match="chosen"):
                posenc.attention(q, k, v, plan, ROTARY, return_lse=True)


@pytest.mark.parametrize("backend", ["reference", "cpu_flash", "auto"])
@pytest.mark.parametrize("sinks", [None, torch.zeros(4)])
def test_an_empty_batch_has_gradients(backend: str, sinks: torch.Tensor | None) -> None:
    plan = posenc.strategy("rerope", window=64, window_size=4).plan(9)
    q, k, v = (torch.zeros(0, heads, 9, 8, requires_grad=True) for heads in (4, 2, 2))
    for plans in (plan, []):
        out, lse = posenc.attention(q, k, v, plans, ROTARY, backend=backend, sinks=sinks, return_lse=True)
        assert (out.shape, lse.shape, lse.dtype) == ((0, 4, 9, 8), (0, 4, 9), torch.float32)
        (out.sum() + lse.sum()).backward()
        assert q.grad is not None
        assert q.grad.shape == q.shape


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_compiled_function_may_call_it(backend: str, grad: bool, rows: int) -> None:
    """With the plan as a closure or an argument, between compiled operations, and for several lengths."""
    torch._dynamo.reset()
    strategy = posenc.strategy("self_extend", window=32, group=4, window_size=8)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any = None) -> torch.Tensor:
        out = posenc.attention(q * 2, k + 1, v, outer if plan is None else plan, ROTARY, backend=backend)
        assert isinstance(out, torch.Tensor)
        return out.sin()

    compiled = torch.compile(layer, backend="eager")
    for total in (40, 45):
        for q_len in (total, 1):
            outer = [strategy.plan(total)] * rows if rows > 1 else strategy.plan(total)
            q, k, v = (x.requires_grad_(grad) for x in tensors(strategy.plan(total), q_len, (4, 2), 8, batch=rows))
            with torch.set_grad_enabled(grad):
                found = [compiled(q, k, v), compiled(q, k, v, outer)]
                expected = layer(q, k, v)
            assert all(torch.equal(x, expected) for x in found)
            if grad:
                grads = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (*found, expected)]
                assert all(torch.equal(x, y) for own in grads[:-1] for x, y in zip(own, grads[-1], strict=True))
