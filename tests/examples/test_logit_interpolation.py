"""The example of logit interpolation passes the contract and equals a dense float64 computation by its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import posenc
from tests.examples.load import example
from tests.hf import tiny
from tests.hf.dense import dense_logits

LogitInterpolation = example("logit_interpolation").LogitInterpolation


class TestContract(posenc.testing.StrategyContract):
    strategy = LogitInterpolation
    params = ({}, {"near": 1}, {"near": 9})


def seen_at(i: int, j: int, *, prompt: int, window: int, near: int) -> float:
    """Return the (fractional) distance of a pair, by the method's definition."""
    squeeze = (prompt - near) / (window - near)
    return float(i - j) if i - j < near else math.floor(i / squeeze + near - near / squeeze) - j / squeeze


def logit(q: Tensor, k: Tensor, distance: float, inv_freq: Tensor) -> float:
    """Return the logit at an integer distance by complex numbers, or interpolated between its neighbours."""
    below, share = math.floor(distance), distance - math.floor(distance)
    half = len(inv_freq)
    product = torch.complex(q[:half], q[half:]) * torch.complex(k[:half], k[half:]).conj()
    found = [float((product * torch.exp(1j * inv_freq * whole)).sum().real) for whole in (below, below + 1)]
    return (1 - share) * found[0] + share * found[1]


@pytest.mark.parametrize("backend", ["reference", "cpu_flash"])
@pytest.mark.parametrize("q_len", [70, 13, 1])
def test_attention_equals_a_dense_computation(backend: str, q_len: int) -> None:
    prompt, total, window, near, dim = 61, 70, 24, 5, 8
    rotary = posenc.Rotary.from_theta(100.0, dim)
    plan = LogitInterpolation(window=window, near=near).plan(prompt, total)
    q, k, v = torch.randn(3, 1, 1, total, dim, generator=torch.Generator().manual_seed(0))
    got = posenc.attention(q[:, :, -q_len:], k, v, plan, rotary, backend=backend)
    between = 0
    for row in range(q_len):
        i = total - q_len + row
        at = [seen_at(i, j, prompt=prompt, window=window, near=near) for j in range(i + 1)]
        between += sum(distance % 1 > 0.01 for distance in at)
        logits = [
            logit(q[0, 0, i].double(), k[0, 0, j].double(), d, rotary.inv_freq.double()) for j, d in enumerate(at)
        ]
        weights = (torch.tensor(logits, dtype=torch.float64) * dim**-0.5).softmax(0)
        assert (got[0, 0, row] - weights @ v[0, 0, : i + 1].double()).abs().max() < 2e-5
    assert between > 30


@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
def test_decoding_equals_prefill_in_a_model(family: str) -> None:
    prompt, total = 90, 110
    model, ids = tiny.make(family), tiny.tokens(1, total)
    strategy = LogitInterpolation(window=tiny.WINDOW, near=10, replan="never")
    at = tiny.positions(model, strategy, prompt, total)
    for index, _ in np.ndenumerate(at.relative):
        at.relative[index] = (
            seen_at(*index, prompt=prompt, window=tiny.WINDOW, near=10) if index[0] >= index[1] else np.nan
        )
    at.mixed[:] = at.relative % 1 > 0
    with torch.no_grad(), posenc.apply(model, strategy):
        cache = DynamicCache(config=model.config)
        got = [model(ids[:, :prompt], past_key_values=cache).logits]
        got += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, total)]
    assert (torch.cat(got, 1)[0] - dense_logits(model, ids[0], at)).abs().max() < 1e-4


def test_it_is_not_position_interpolation() -> None:
    plan = LogitInterpolation(window=24).plan(60)
    rotary = posenc.Rotary.from_theta(100.0, 8)
    cos, _ = rotary.tables(np.array([2.5]), interpolation="logits")
    one, other = (rotary.tables(np.array([p]))[0] for p in (2, 3))
    assert torch.allclose(cos, (one + other) / 2)
    assert not torch.allclose(cos, rotary.tables(np.array([2.5]))[0], atol=1e-2)
    assert "logits of whole positions interpolated" in plan.explain()
