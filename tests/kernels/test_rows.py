"""Batches in which each row has its own plan, keys and mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import posenc
from posenc.rope import Rotary
from posenc.testing import attention_by_definition

TOTAL, NEW, ROWS = 90, 7, 4
TOLERANCE = 2e-5
ROTARY = Rotary.from_theta(1e4, 16)
BACKENDS = ("auto", "reference", "cpu_flash")


def plans() -> list[posenc.PositionPlan]:
    """Plans of strategies that see the same tokens differently, plain RoPE among them, and one plan twice."""
    made = [
        posenc.strategy("lampe", window=64, mapping=40, head=12, tail=6).plan(TOTAL - 5, TOTAL),
        posenc.strategy("rope", window=64).plan(TOTAL),
        posenc.strategy("streaming_llm", window=64, window_size=16, sinks=4).plan(TOTAL),
    ]
    return [*made, made[0]]


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(ROWS, heads, tokens, 16, generator=generator)
        for heads, tokens in ((4, NEW), (2, TOTAL), (2, TOTAL))
    )
    return q, k, v


def masks() -> Tensor:
    """Return bool [ROWS, 1, NEW, TOTAL]: row 0 hides nothing, the others hide their padding and single pairs."""
    mask = torch.rand(ROWS, 1, NEW, TOTAL, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[0] = True
    for row in range(1, ROWS):
        mask[row, ..., : 11 * row] = False
    return mask


def of_row(x: Any, row: int) -> Any:
    return None if x is None else x[row : row + 1]


@pytest.mark.parametrize(
    ("backend", "softcap"), [*((name, None) for name in BACKENDS), ("auto", 1.5), ("reference", 1.5)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_every_row_has_its_own_plan_and_mask(backend: str, softcap: float | None, masked: bool) -> None:
    (q, k, v), own = case(), plans()
    mask = masks() if masked else None
    got, lse = posenc.attention(q, k, v, own, ROTARY, backend=backend, mask=mask, return_lse=True, softcap=softcap)
    for row, plan in enumerate(own):
        rows = (of_row(x, row) for x in (q, k, v))
        expected = attention_by_definition(*rows, plan, ROTARY, mask=of_row(mask, row), softcap=softcap)
        assert (got[row] - expected[0][0]).abs().max() < TOLERANCE, row
        assert (lse[row] - expected[1][0]).abs().max() < TOLERANCE, row


@pytest.mark.parametrize("backend", BACKENDS)
def test_with_one_plan_for_all_rows_each_keeps_its_mask(backend: str) -> None:
    (q, k, v), plan, mask = case(), plans()[0], masks()
    for given in (plan, [plan] * ROWS):
        got = posenc.attention(q, k, v, given, ROTARY, backend=backend, mask=mask)
        expected, _ = attention_by_definition(q, k, v, plan, ROTARY, mask=mask)
        assert (got - expected).abs().max() < TOLERANCE


def test_sinks_reach_every_row() -> None:
    (q, k, v), own, mask = case(), plans(), masks()
    sinks = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    got, lse = posenc.attention(q, k, v, own, ROTARY, mask=mask, sinks=sinks, return_lse=True)
    for row, plan in enumerate(own):
        rows = (of_row(x, row) for x in (q, k, v))
        out, plain = attention_by_definition(*rows, plan, ROTARY, mask=of_row(mask, row))
        more = torch.logaddexp(plain, sinks[:, None].double())
        assert (lse[row] - more[0]).abs().max() < TOLERANCE
        assert (got[row] - (out * (plain - more).exp()[..., None])[0]).abs().max() < TOLERANCE


def test_gradients_of_masked_rows_with_their_own_plans_are_exact() -> None:
    own, mask = plans(), masks()
    ours, theirs = ([x.requires_grad_() for x in case()] for _ in range(2))
    weight = torch.randn(ROWS, 4, NEW, 16, generator=torch.Generator().manual_seed(2))
    (posenc.attention(*ours, own, ROTARY, mask=mask) * weight).sum().backward()
    for row, plan in enumerate(own):
        out, _ = attention_by_definition(*(of_row(x, row) for x in theirs), plan, ROTARY, mask=of_row(mask, row))
        (out[0] * weight[row]).sum().backward()
    for got, expected in zip(ours, theirs, strict=True):
        assert got.grad is not None
        assert expected.grad is not None
        assert (got.grad - expected.grad).abs().max() < 1e-4
