"""Threads that share a patched model, a plan or the library itself get the same results as alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import posenc
from posenc.planning.planner import Planner
from posenc.rope import Rotary
from tests.hf import tiny
from tests.hf.threads import PATIENCE, at_once, shared_out
from tests.hf.tiny import LAMPE

TOLERANCE = 1e-4


def request(model: Any, length: int, steps: int = 3) -> Tensor:
    """Return logits of a prompt's last token and of decoded ones, on a cache of its own."""
    ids = tiny.tokens(1, length + steps, seed=length)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = [model(ids[:, :length], past_key_values=cache).logits[:, -1]]
        parts += [model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(length, length + steps)]
    return torch.cat(parts)


def in_chunks(model: Any, length: int) -> Tensor:
    """Return logits of a prompt that is read a few tokens at a time."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        parts = tiny.tokens(1, length, seed=length).split(17, 1)
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)[0]


def announced(model: Any, handle: posenc.Handle, length: int) -> Tensor:
    """Return the same with the length announced."""
    with handle.prompt_length(length):
        return in_chunks(model, length)


def farthest(got: dict[Any, Tensor], expected: dict[Any, Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(float((got[key] - expected[key]).abs().max()) for key in expected)


def test_an_announced_length_applies_only_to_its_own_thread() -> None:
    model = tiny.make("llama")
    is_announced, is_read = threading.Event(), threading.Event()
    with posenc.apply(model, "lampe", **LAMPE) as handle:
        expected = request(model, 80)

        def announce() -> None:
            with handle.prompt_length(150):
                is_announced.set()
                assert is_read.wait(PATIENCE)

        def read_unannounced() -> Tensor:
            assert is_announced.wait(PATIENCE)
            try:
                return request(model, 80)
            finally:
                is_read.set()

        _, got = at_once(announce, read_unannounced)
        assert (got - expected).abs().max() < TOLERANCE


def test_overlapping_announcements_do_not_disturb_each_other() -> None:
    model = tiny.make("llama")
    one_is_in, two_is_in, one_is_out = (threading.Event() for _ in range(3))
    with posenc.apply(model, "lampe", **LAMPE) as handle:
        expected = [announced(model, handle, length) for length in (90, 120)]
        plain = request(model, 70)

        def one() -> Tensor:
            with handle.prompt_length(90):
                one_is_in.set()
                assert two_is_in.wait(PATIENCE)
                logits = in_chunks(model, 90)
            one_is_out.set()
            return logits

        def two() -> Tensor:
            assert one_is_in.wait(PATIENCE)
            with handle.prompt_length(120):
                two_is_in.set()
                assert one_is_out.wait(PATIENCE)
                return in_chunks(model, 120)

        got = at_once(one, two)
        for logits, right in zip(got, expected, strict=True):
            assert (logits - right).abs().max() < TOLERANCE
        assert (request(model, 70) - plain).abs().max() < TOLERANCE


def test_announced_and_other_prompts_run_side_by_side() -> None:
    model, lengths = tiny.make("llama"), range(66, 106, 4)
    with posenc.apply(model, "lampe", **LAMPE) as handle:
        expected = {length: announced(model, handle, length) for length in lengths}
        whole = {length: request(model, length) for length in lengths}
        got = at_once(
            lambda: {length: announced(model, handle, length) for length in lengths},
            lambda: {length: request(model, length) for length in lengths},
            lambda: {length: announced(model, handle, length) for length in reversed(lengths)},
        )
    assert farthest(got[0], expected) < TOLERANCE
    assert farthest(got[1], whole) < TOLERANCE
    assert farthest(got[2], expected) < TOLERANCE


@pytest.mark.parametrize(("name", "params"), [("rope", {}), ("rerope", {"window_size": 9}), ("lampe", LAMPE)])
def test_longrope_is_exact_past_its_window(name: str, params: dict[str, Any]) -> None:
    model, lengths = tiny.scaled("longrope"), range(70, 110, 2)
    with posenc.apply(model, name, **params):
        expected = {length: request(model, length) for length in lengths}
        for _ in range(2):
            assert farthest(shared_out(lambda length: request(model, length), lengths, 2), expected) < TOLERANCE


@pytest.mark.parametrize("kind", tiny.SCALINGS)
@pytest.mark.parametrize(("name", "params"), [("rerope", {"window_size": 9}), ("lampe", LAMPE)])
def test_frequencies_by_length_are_exact_on_both_sides_of_the_window(
    kind: str, name: str, params: dict[str, Any]
) -> None:
    model = tiny.scaled(kind)
    lengths = range(20, 140, 5)  # ascending, so that no request alone follows a longer one
    with posenc.apply(model, name, **params):
        expected = {length: request(model, length) for length in lengths}
        mixed = sorted(lengths, key=lambda length: (length * 7) % 31)
        assert farthest(shared_out(lambda length: request(model, length), mixed, 3), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "params"),
    [("lampe", LAMPE), ("rerope", {"window_size": 9, "frequencies": {"name": "dynamic", "factor": 4}})],
)
def test_more_lengths_than_stored_plans_are_exact(name: str, params: dict[str, Any]) -> None:
    model = tiny.make("llama")
    lengths = [4 + (number * 37) % 73 for number in range(73)]
    with posenc.apply(model, name, window=32, **params):
        expected = {length: request(model, length, steps=1) for length in lengths}
        got = shared_out(lambda length: request(model, length, steps=1), lengths, 3)
        assert farthest(got, expected) < TOLERANCE


@pytest.mark.parametrize("what", ["plan", "rotary"])
def test_a_planner_is_exact_with_more_lengths_than_it_stores(what: str) -> None:
    planner, base = Planner(posenc.strategy("dynamic", window=16, factor=4)), Rotary.from_theta(1e4, 16)
    lengths = range(1, 200)  # more than the planner stores
    expected = {length: planner.strategy.rotary(base, length).inv_freq for length in lengths}

    def check(length: int) -> None:
        if what == "plan":
            assert planner.plan(length, length).total == length
        else:
            assert torch.equal(planner.rotary(base, length).inv_freq, expected[length])

    parts = [[*lengths[first:], *lengths[:first]] * (6 if what == "plan" else 8) for first in range(4)]
    at_once(*(lambda part=part: [check(length) for length in part] for part in parts))


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
def test_one_plan_works_in_several_threads(backend: str) -> None:
    rotary = Rotary.from_theta(1e4, 16)

    def attended(plan: posenc.PositionPlan, case: tuple[int, int]) -> Tensor:
        seed, new = case
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (
            torch.randn(1, heads, length, 16, generator=generator)
            for heads, length in ((4, new), (2, plan.total), (2, plan.total))
        )
        out = posenc.attention(q, k, v, plan, rotary, backend=backend)
        assert isinstance(out, Tensor)
        return out

    cases = [(seed, new) for seed in range(6) for new in (1, 1, 7, 90)]
    for name, params in (("lampe", LAMPE), ("self_extend", {"group": 4, "window_size": 16})):
        strategy = posenc.strategy(name, window=64, **params)
        expected = {case: attended(strategy.plan(85, 90), case) for case in cases}
        for _ in range(3):
            plan = strategy.plan(85, 90)  # a new plan, so that all threads derive its tables at once
            assert farthest(shared_out(lambda case, plan=plan: attended(plan, case), cases, 3), expected) < 2e-5


def test_one_strategy_works_in_several_threads() -> None:
    strategy = posenc.strategy("lampe", window=64, **LAMPE)
    lengths = list(range(1, 121))
    expected = {length: torch.from_numpy(strategy.plan(length).relative_positions()) for length in lengths}
    got = shared_out(lambda length: torch.from_numpy(strategy.plan(length).relative_positions()), lengths, 3)
    for length in lengths:
        assert torch.equal(got[length].nan_to_num(-1.0), expected[length].nan_to_num(-1.0))


def test_models_are_patched_and_restored_side_by_side() -> None:
    models = [tiny.make(family) for family in ("llama", "qwen3", "llama")]
    strategies: list[tuple[str, dict[str, Any]]] = [("lampe", LAMPE), ("rerope", {"window_size": 9}), ("rope", {})]
    ids = tiny.tokens(1, 80)

    def stock(model: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(ids).logits
        return logits

    plain = [stock(model) for model in models]
    patched = []
    for model, (name, params) in zip(models, strategies, strict=True):
        with posenc.apply(model, name, **params):
            patched.append(stock(model))

    def over_and_over(number: int) -> None:
        model, (name, params) = models[number], strategies[number]
        for _ in range(6):
            with posenc.apply(model, name, **params) as handle:
                assert torch.equal(stock(model), patched[number])
                assert handle.is_active
            assert torch.equal(stock(model), plain[number])
            assert posenc.attached(model) is None

    at_once(*(lambda number=number: over_and_over(number) for number in range(len(models))))
    assert [model.config._attn_implementation for model in models] == ["sdpa"] * 3
