"""Several decoded tokens in one forward while plans change in between: each token keeps its own plan."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import posenc
from tests.hf import tiny
from tests.hf.dense import Positions, dense_logits

PROMPT, STEPS = 70, 24
TOLERANCE = 1e-4
REMAPS: dict[str, dict[str, Any]] = {
    "lampe": tiny.LAMPE,
    "streaming_llm": {"window_size": 10, "sinks": 3},  # drops keys, in plans and in caches
}


def decoded(model: Any, ids: torch.Tensor, chunks: Sequence[int], kind: str = "dynamic") -> torch.Tensor:
    """Return logits of the tokens after the prompt, in chunks of these sizes, as assisted generation runs them."""
    total = ids.shape[1]
    cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=total)
    model(ids[:, :PROMPT], past_key_values=cache)
    cuts = [min(cut, total) for cut in accumulate(chunks, initial=PROMPT)]
    parts = [
        model(ids[:, low:high], past_key_values=cache, logits_to_keep=high - low).logits
        for low, high in pairwise(cuts)
        if low < high
    ]
    return torch.cat(parts, 1)[0]


def replanned(model: Any, strategy: posenc.PositionStrategy, rule: int, total: int) -> Positions:
    """Return dense positions if a plan for the length so far is made after every ``rule`` decoded tokens."""
    at = tiny.positions(model, strategy, PROMPT, total)
    for length in range(PROMPT + rule, total + 1, rule):
        later = tiny.positions(model, strategy, length, total)
        at.relative[length - 1 :], at.scale[length - 1 :] = later.relative[length - 1 :], later.scale[length - 1 :]
    return at


@pytest.mark.parametrize("name", REMAPS)
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "qwen2_sliding"])
@example(rule=5, chunks=[5] * 4)  # the last token of every forward has a new plan
@example(rule=4, chunks=[12, 12])
@settings(max_examples=6)
@given(rule=st.integers(1, 9), chunks=st.lists(st.integers(1, 12), min_size=4, max_size=8))
def test_tokens_in_one_forward_keep_the_plans_of_single_tokens(
    family: str, name: str, rule: int, chunks: list[int]
) -> None:
    model, total = tiny.make(family), PROMPT + min(sum(chunks), STEPS)
    strategy = posenc.strategy(name, window=tiny.WINDOW, replan=rule, **REMAPS[name])
    ids = tiny.tokens(1, total)
    with torch.no_grad(), posenc.apply(model, strategy):
        got = decoded(model, ids, chunks)
    expected = dense_logits(model, ids[0], replanned(model, strategy, rule, total))[PROMPT:]
    assert (got - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["mistral_sliding", "qwen2_sliding"])
@pytest.mark.parametrize("cache", ["rotated", "raw"])
def test_two_plans_are_exact_on_a_cache_that_dropped_keys(family: str, kind: str, cache: Any) -> None:
    model, ids = tiny.make(family), tiny.tokens(1, PROMPT + STEPS)
    strategy = posenc.strategy("lampe", window=tiny.WINDOW, replan=7, **REMAPS["lampe"])
    with torch.no_grad(), posenc.apply(model, strategy, cache=cache):
        got, single = (decoded(model, ids, chunks, kind) for chunks in ([3, 9, 1, 9, 2], [1] * STEPS))
    expected = dense_logits(model, ids[0], replanned(model, strategy, 7, PROMPT + STEPS))[PROMPT:]
    assert (got - expected).abs().max() < TOLERANCE
    assert (got - single).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding"])
def test_frequencies_follow_every_token_of_a_forward(family: str) -> None:
    model, ids = tiny.make(family), tiny.tokens(1, PROMPT + STEPS)
    strategy = posenc.strategy("dynamic", window=tiny.WINDOW, factor=4)
    with torch.no_grad(), posenc.apply(model, strategy):
        got = decoded(model, ids, [3, 9, 1, 9, 2])
    expected = dense_logits(model, ids[0], tiny.positions(model, strategy, PROMPT, PROMPT + STEPS))[PROMPT:]
    assert (got - expected).abs().max() < TOLERANCE
