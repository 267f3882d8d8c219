"""A row uses the frequencies of its own length, whatever runs beside it and whatever ran before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import posenc
from tests.hf import tiny
from tests.hf.dense import Positions, dense_logits

TOLERANCE = 1e-4
STEPS = 6
LENGTHS = (100, 62, 40, 11)
"""Lengths above the original window, crossing it while decoding, and below it."""
REMAPS: dict[str, dict[str, Any]] = {
    "rerope": {"window_size": 9},
    "lampe": {**tiny.LAMPE, "replan": "never"},
}

pytestmark = [pytest.mark.parametrize("name", REMAPS), pytest.mark.parametrize("kind", tiny.SCALINGS)]


def decoded(model: Any, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
    """Return logits of a prompt and of tokens decoded one by one, [B, L, vocab]."""
    with torch.no_grad():
        return tiny.decoded(model, ids, ids.shape[1] - STEPS, cache, mask)


def row(length: int) -> Tensor:
    return tiny.tokens(1, length + STEPS, seed=length)


def alone(kind: str, name: str, length: int) -> Tensor:
    """Return the logits of a row on a model that never ran anything else."""
    model = tiny.scaled(kind)
    with posenc.apply(model, name, window=tiny.WINDOW, **REMAPS[name]):
        return decoded(model, row(length), DynamicCache(config=model.config))[0]


def batch(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return left-padded tokens and their mask."""
    width = max(lengths) + STEPS
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for number, length in enumerate(lengths):
        ids[number, width - length - STEPS :], mask[number, width - length - STEPS :] = row(length)[0], 1
    return ids, mask


@pytest.mark.parametrize("length", LENGTHS)
def test_a_prompt_alone_uses_the_models_own_frequencies(kind: str, name: str, length: int) -> None:
    model = tiny.scaled(kind)
    module = model.model.rotary_emb
    cos, sin = module(torch.zeros(1), torch.arange(length)[None])  # sets the frequencies of this length
    factor = float(torch.hypot(cos, sin).mean())
    plan = posenc.strategy(name, window=tiny.WINDOW, **REMAPS[name]).plan(length)
    at = Positions(
        plan.relative_positions(),
        np.ones(length) if plan.query_scale is None else plan.query_scale,
        module.inv_freq.expand(length, -1),
        torch.full((length,), factor),
        np.zeros((length, length), dtype=bool),
    )
    expected = dense_logits(model, row(length)[0, :length], at)
    assert (alone(kind, name, length)[:length] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("lengths", [LENGTHS, (62, 11), (40, 11), (100, 80)])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_row_of_a_batch_gives_the_same_as_alone(kind: str, name: str, lengths: Sequence[int], cache: str) -> None:
    model, (ids, mask) = tiny.scaled(kind), batch(lengths)
    with posenc.apply(model, name, window=tiny.WINDOW, **REMAPS[name]):
        held = DynamicCache(config=model.config)
        if cache == "static":
            held = StaticCache(config=model.config, max_cache_len=ids.shape[1])
        logits = decoded(model, ids, held, mask)
    for number, length in enumerate(lengths):
        row_logits = logits[number, -length - STEPS :]
        assert (row_logits - alone(kind, name, length)).abs().max() < TOLERANCE, length


def test_earlier_prompts_change_nothing(kind: str, name: str) -> None:
    model = tiny.scaled(kind)
    with posenc.apply(model, name, window=tiny.WINDOW, **REMAPS[name]):
        for length in (130, *LENGTHS, 90, 11):
            got = decoded(model, row(length), DynamicCache(config=model.config))[0]
            assert (got - alone(kind, name, length)).abs().max() < TOLERANCE, length


def test_two_caches_in_turn_do_not_disturb_each_other(kind: str, name: str) -> None:
    model, (long, short) = tiny.scaled(kind), (row(100), row(62))
    with posenc.apply(model, name, window=tiny.WINDOW, **REMAPS[name]), torch.no_grad():
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        parts = [[model(x[:, :-STEPS], past_key_values=c).logits for x, c in zip((long, short), caches, strict=True)]]
        for i in range(STEPS, 0, -1):
            token = slice(-i, -i + 1 or None)
            steps = zip((long, short), caches, strict=True)
            parts.append([model(x[:, token], past_key_values=c).logits for x, c in steps])
    for number, length in enumerate((100, 62)):
        got = torch.cat([part[number] for part in parts], 1)[0]
        assert (got - alone(kind, name, length)).abs().max() < TOLERANCE, length
