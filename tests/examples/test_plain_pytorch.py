"""The example in plain PyTorch, compared with a dense float64 computation of the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import posenc
from tests.examples.load import example

plain = example("plain_pytorch")


def dense(model: torch.nn.Module, tokens: Tensor, plan: posenc.PositionPlan) -> Tensor:
    """Return float64 logits [L, vocabulary] of one row, from a plan's relative positions, by complex numbers."""
    x = model.embed.weight.double()[tokens]
    length, half = len(tokens), plain.HEAD_DIM // 2
    for layer, norm in zip(model.layers, model.norms, strict=True):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps) * norm.weight.double()
        q, k, v = (
            (y @ part.weight.double().T).view(length, -1, plain.HEAD_DIM)
            for part in (layer.query, layer.key, layer.value)
        )
        k, v = (z.repeat_interleave(plain.HEADS // plain.KEY_HEADS, 1) for z in (k, v))
        pairs = [torch.complex(z[..., :half], z[..., half:]) for z in (q, k)]
        seen = torch.from_numpy(plan.relative_positions())
        turn = torch.exp(1j * seen.nan_to_num()[..., None] * model.rotary.inv_freq.double())
        logits = torch.einsum("ihf,jhf,ijf->hij", pairs[0], pairs[1].conj(), turn).real * plain.HEAD_DIM**-0.5
        if plan.query_scale is not None:
            logits = logits * torch.from_numpy(plan.query_scale)[:, None]
        weights = logits.masked_fill(seen.isnan(), -torch.inf).softmax(-1)
        x = x + torch.einsum("hij,jhd->ihd", weights, v).flatten(1) @ layer.out.weight.double().T
    return x @ model.head.weight.double().T


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("rerope", {"window_size": 8}),
        ("lampe", {"head": 8, "tail": 4, "mapping": 24}),
        ("lm_infinite", {"window_size": 16}),
    ],
)
def test_prefill_and_decode_equal_a_dense_computation(name: str, params: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, prompt, new = plain.Decoder(), 100, 12
    strategy = posenc.strategy(name, window=plain.WINDOW, **params)
    tokens = torch.randint(plain.VOCABULARY, (1, prompt))
    found = model.generate(tokens, new, strategy)
    ids = torch.cat((tokens, found), 1)
    plan = strategy.plan(prompt, prompt + new)
    expected = dense(model, ids[0], plan)
    assert torch.equal(found[0], expected[prompt - 1 : -1].argmax(-1))
    with torch.no_grad():
        caches: list[list[Tensor]] = [[] for _ in model.layers]
        got = [model(ids[:, :prompt], caches, plan)]
        got += [model(ids[:, i : i + 1], caches, plan) for i in range(prompt, prompt + new)]
    assert (torch.cat(got, 1)[0] - expected).abs().max() < 2e-5
    rope = posenc.strategy("rope").plan(prompt + new)
    assert (dense(model, ids[0], rope) - expected).abs().max() > 1e-2
