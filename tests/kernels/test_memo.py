"""What is kept on plans: usable outside of the mode it was made in, and bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

import posenc
from posenc.kernels import one_query
from posenc.kernels.kept import KeptKeys
from posenc.kernels.memo import MOST, remembered
from posenc.kernels.rotated import layout
from posenc.testing.tensors import installed
from tests.kernels import stand_ins
from tests.models import tiny

STRATEGIES: dict[str, dict[str, Any]] = {
    "self_extend": {"group": 4, "window_size": 8},
    "lampe": {"mapping": 20, "head": 6, "tail": 4},
    "lm_infinite": {"window_size": 9, "sinks": 3},
}


def scaled(plan: posenc.PositionPlan) -> posenc.PositionPlan:
    """With a factor on the logits of every query."""
    factors = 1.0 + torch.arange(plan.total).double().numpy() / 50
    return posenc.PositionPlan.build(posenc.Lengths(plan.prompt, plan.total), plan.segments, query_scale=factors)


def qkv(q_len: int, *, grad: bool = False, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(q_len)
    sizes = ((4, q_len), (2, 40), (2, 40))
    return [torch.randn(1, heads, n, 16, generator=generator).to(dtype).requires_grad_(grad) for heads, n in sizes]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("first", [40, 1])
@pytest.mark.parametrize("rotated", [(0, 16), (4, 12)])
def test_evaluation_in_inference_mode_and_then_training(name: str, first: int, rotated: tuple[int, int]) -> None:
    """One plan and one rotary, both of which may have been made in inference mode too."""
    gradients = []
    for before in (False, True):
        with torch.inference_mode(before):
            plan = scaled(posenc.strategy(name, window=32, **STRATEGIES[name]).plan(40))
            rotary = posenc.Rotary.from_theta(1e4, rotated[1] - rotated[0], channels=rotated)
            if before:
                posenc.attention(*qkv(first), plan, rotary)
        for q_len in (40, 1):
            leaves = qkv(q_len, grad=True)
            posenc.attention(*leaves, plan, rotary).square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
    for unused, used in zip(gradients[:2], gradients[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(unused, used, strict=True))


def test_tensors_that_every_backend_keeps_are_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posenc.kernels.torch_flash.forward", stand_ins.flash_forward)
    own = [posenc.backends()[name].backend for name in ("cpu_flash", "triton")]
    for backend in (stand_ins.SimulatedXformers(), stand_ins.SimulatedTorchFlash(), *own):
        plan, rotary = posenc.strategy("self_extend", window=32).plan(40), posenc.Rotary.from_theta(1e4, 16)
        for q_len in (40, 1):
            with installed(backend) as name, torch.inference_mode():
                posenc.attention(*qkv(q_len, dtype=torch.bfloat16), plan, rotary, backend=name)
        memos = [plan.memo, *(s.memo for s in plan.segments)]
        for q_len in (40, 1):
            memos += [work.memo for work in layout(plan, q_len).work]
        kept = [tensor for memo in memos for tensor in tensors_in(memo)]
        assert kept
        assert not any(tensor.is_inference() for tensor in kept)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors that a memo holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, posenc.Segment | posenc.Rotary):
        return tensors_in([getattr(value, field) for field in value.__dataclass_fields__])
    return []


def test_kept_keys_go_in_and_out_of_inference_mode() -> None:
    whole, rotary = (
        posenc.strategy("lampe", window=32, **STRATEGIES["lampe"]).plan(30, 40),
        posenc.Rotary.from_theta(1e4, 16),
    )
    kept, (_, k, v) = KeptKeys(), qkv(1)
    for length in range(31, 41):
        with torch.inference_mode(length % 2 == 1), torch.no_grad(), mock.patch.object(one_query, "GRAIN", 1):
            case = k[:, :, length - 1 : length], k[:, :, :length], v[:, :, :length], whole.prefix(length), rotary
            got = posenc.attention(*case, kept=kept)
            assert (got - posenc.attention(*case, backend="reference")).abs().max() < 2e-5
    assert kept.bytes > 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_model_is_evaluated_in_inference_mode_and_then_trained(name: str) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 50)
    gradients: list[torch.Tensor] = []
    with posenc.apply(model, name, window=32, **STRATEGIES[name]):
        for _ in range(2):
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
            with torch.inference_mode():
                model(ids)
                model.generate(ids, max_new_tokens=3, min_new_tokens=3)
    with posenc.apply(model, name, window=32, **STRATEGIES[name]):
        with torch.inference_mode():
            model(ids)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


def test_a_memo_is_bounded_and_makes_things_once() -> None:
    memo: dict[Any, Any] = {}
    made: list[int] = []

    def make(number: int) -> Callable[[], None]:
        return lambda: made.append(number)

    for number in range(3 * MOST):
        for _ in range(2):
            assert remembered(memo, number, make(number)) is None  # what is made may be None
        assert len(memo) == min(number + 1, MOST)
    assert made == list(range(3 * MOST))
    assert list(memo) == list(range(2 * MOST, 3 * MOST))
