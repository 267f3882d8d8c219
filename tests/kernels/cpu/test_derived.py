"""Data derived from plans is usable outside the mode it was made in, and bounded."""

from __future__ import annotations

import copy
import pickle
from dataclasses import is_dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import posenc
from posenc.kernels.cpu import decode_calls
from posenc.kernels.rotated import rotation_layout
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.planning.memory import held_bytes
from posenc.planning.planner import KEPT_BYTES, Planner
from posenc.testing.tensors import installed
from tests.hf import tiny
from tests.kernels import stand_ins

STRATEGIES: dict[str, dict[str, Any]] = {
    "self_extend": {"group": 4, "window_size": 8},
    "lampe": {"mapping": 20, "head": 6, "tail": 4},
    "lm_infinite": {"window_size": 9, "sinks": 3},
}


def scaled(plan: posenc.PositionPlan) -> posenc.PositionPlan:
    """The plan with a factor on the logits of every query."""
    factors = 1.0 + torch.arange(plan.total).double().numpy() / 50
    return posenc.PositionPlan.build(posenc.Lengths(plan.prompt, plan.total), plan.segments, query_scale=factors)


def qkv(q_len: int, *, grad: bool = False, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(q_len)
    sizes = ((4, q_len), (2, 40), (2, 40))
    return [torch.randn(1, heads, n, 16, generator=generator).to(dtype).requires_grad_(grad) for heads, n in sizes]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("first", [40, 1])
@pytest.mark.parametrize("rotated", [(0, 16), (4, 12)])
def test_a_plan_used_in_inference_mode_works_in_training(name: str, first: int, rotated: tuple[int, int]) -> None:
    """The plan and the rotary may both have been made in inference mode."""
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


def test_no_backend_stores_inference_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posenc.kernels.windowed.torch_flash.forward", stand_ins.flash_forward)
    own = [posenc.backends()[name].backend for name in ("cpu_flash", "triton")]
    for backend in (stand_ins.SimulatedXformers(), stand_ins.SimulatedTorchFlash(), *own):
        plan, rotary = posenc.strategy("self_extend", window=32).plan(40), posenc.Rotary.from_theta(1e4, 16)
        for q_len in (40, 1):
            with installed(backend) as name, torch.inference_mode():
                posenc.attention(*qkv(q_len, dtype=torch.bfloat16), plan, rotary, backend=name)
        kept = tensors_in(plan)
        assert kept
        assert not any(tensor.is_inference() for tensor in kept)


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """All tensors that values lead to, what is derived from them included."""
    found, seen, waiting = [], set(), list(values)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, tuple | list):
            waiting.extend(value)
        elif is_dataclass(value):
            waiting.extend(vars(value).values())
    return found


def test_cached_rotated_keys_work_in_and_out_of_inference_mode() -> None:
    whole, rotary = (
        posenc.strategy("lampe", window=32, **STRATEGIES["lampe"]).plan(30, 40),
        posenc.Rotary.from_theta(1e4, 16),
    )
    kept, (_, k, v) = RotatedKeyCache(), qkv(1)
    for length in range(31, 41):
        with torch.inference_mode(length % 2 == 1), torch.no_grad(), mock.patch.object(decode_calls, "GRAIN", 1):
            case = k[:, :, length - 1 : length], k[:, :, :length], v[:, :, :length], whole.prefix(length), rotary
            got = posenc.attention(*case, kept=kept)
            assert (got - posenc.attention(*case, backend="reference")).abs().max() < 2e-5
    assert kept.bytes > 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_model_used_in_inference_mode_can_be_trained(name: str) -> None:
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


def used(planner: Planner, prompt: int) -> posenc.PositionPlan:
    """Return the plan of a prompt, after a backend has derived tables from it."""
    plan = planner.plan(prompt, prompt)
    generator = torch.Generator().manual_seed(prompt)
    q, k, v = (torch.randn(1, heads, prompt, 16, generator=generator) for heads in (4, 2, 2))
    posenc.attention(q, k, v, plan, posenc.Rotary.from_theta(1e4, 16))
    return plan


def test_stored_plans_are_bounded_by_memory_and_not_by_number() -> None:
    planner = Planner(posenc.strategy("self_extend", window=32))
    one = held_bytes(used(planner, 100))
    tables = 2 * 2 * 2 * 100 * 8 * 4  # cos and sin [100, 8] of queries and keys, in two segments
    assert one > tables
    planner = Planner(posenc.strategy("self_extend", window=32))
    for prompt in range(100, 300):  # more than 64 short ones
        used(planner, prompt)
    assert list(planner._plans) == list(range(100, 300))
    planner._room = 40 * one
    for prompt in range(401, 413):
        used(planner, 100)  # used repeatedly, so that it stays
        used(planner, prompt)
        assert held_bytes({p: own for p, own in planner._plans.items() if p != prompt}) <= planner._room
    assert {100, 411, 412} <= planner._plans.keys()
    assert not {401, 402, 200, 299} & planner._plans.keys()
    planner._room = 0
    used(planner, 77)
    assert list(planner._plans) == [77]
    assert planner._sizes == {}


def test_many_prompts_of_a_model_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make("llama")
    handle = posenc.apply(model, "self_extend", window=32)
    room = 400_000
    handle._attachment.planner._room = room
    with torch.no_grad():
        for prompt in range(200, 230):
            model.generate(tiny.tokens(1, prompt), max_new_tokens=2, min_new_tokens=2)
            plans = handle._attachment.planner._plans
            assert prompt in plans
            assert held_bytes({p: own for p, own in plans.items() if p != prompt}) <= room
    assert 1 < len(plans) < 15
    handle.remove()


def test_layers_with_their_own_plans_share_the_memory() -> None:
    class ByLayer(type(posenc.strategy("self_extend", window=32))):  # type: ignore[misc]
        def for_layer(self, layer: int, layers: int) -> Any:
            return posenc.strategy("self_extend", window=32, group=2 + layer)

    planner = Planner(ByLayer(window=32), 4)
    assert [planner.of(layer)._room for layer in range(4)] == [KEPT_BYTES // 4] * 4


def test_shared_memory_counts_once() -> None:
    array, tensor = np.zeros(100), torch.zeros(50)
    assert held_bytes(array, array[3:], [array[::2]], {"a": (tensor, tensor[5:]), "b": tensor.view(5, 10)}) == 1000


def test_equal_rotaries_share_what_is_kept() -> None:
    """A model whose frequencies follow the length makes a new rotary in every forward."""
    plan = posenc.strategy("self_extend", window=32).plan(40)
    entries = None
    for _ in range(20):
        for q_len in (40, 1):
            posenc.attention(*qkv(q_len), plan, posenc.Rotary.from_theta(1e4, 16))
        counts = [len(own._derived) for own in (plan, *plan.segments, *rotation_layout(plan, 1).queries)]
        entries = entries or counts
        assert counts == entries


def test_a_model_with_dynamic_frequencies_stores_bounded_tables() -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    handle = posenc.apply(model, "self_extend", window=64, group=4, window_size=8)
    with torch.no_grad():
        for _ in range(4):
            for prompt in (70, 90, 110):
                model(tiny.tokens(1, prompt) % 61)
    for plan in handle._attachment.planner._plans.values():
        assert len(plan._derived) <= 2 * 3  # the frequencies grow with the longest text so far, and then stay
        assert all(len(segment._derived) <= 2 for segment in plan.segments)
    handle.remove()


def test_rotaries_are_compared_by_value() -> None:
    own, same = (posenc.Rotary.from_theta(1e4, 16) for _ in range(2))
    assert own == same
    assert hash(own) == hash(same)
    assert own == posenc.Rotary(own.inv_freq.double(), theta=1e4)
    for changes in (
        {"inv_freq": own.inv_freq * 2},
        {"attention_scaling": 1.1},
        {"style": "interleaved"},
        {"channels": (2, 18)},
        {"theta": None},
        {"arithmetic": "float32"},
    ):
        assert replace(own, **changes) != own  # type: ignore[arg-type]
    assert own != "a rotary"
    for _ in range(4):
        for writes in range(4):  # whatever write count a copy starts with
            for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
                for _ in range(writes):
                    other.inv_freq.mul_(2.0)
                assert (other == own) == (writes == 0)
        own.inv_freq.mul_(0.5)
        assert own != same
    with torch.inference_mode():
        assert posenc.Rotary.from_theta(1e4, 16) == same


@pytest.mark.parametrize("backend", ["cpu_flash", "reference", "triton"])
def test_frequencies_changed_in_place_are_read_again(backend: str) -> None:
    plan, rotary, kept = (
        posenc.strategy("self_extend", window=32).plan(40),
        posenc.Rotary.from_theta(1e4, 16),
        RotatedKeyCache(),
    )
    for q_len in (40, 1, 40, 1):
        got = posenc.attention(*qkv(q_len), plan, rotary, backend=backend, kept=kept)
        fresh = posenc.strategy("self_extend", window=32).plan(40)
        right = posenc.attention(*qkv(q_len), fresh, posenc.Rotary(rotary.inv_freq.clone()), backend="reference")
        assert (got - right).abs().max() < 2e-5
        rotary.inv_freq.mul_(0.7)
