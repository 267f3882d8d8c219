"""Continuous batching of many requests: they share prefixes exactly when the keys have the same values."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import PagedAttentionCache

import posenc
from tests.hf import tiny

LAMPE: dict[str, Any] = {"head": 4, "tail": 3, "mapping": 10}


def batched(model: Any, inputs: list[list[int]], new: int, **sizes: int) -> list[list[int]]:
    outputs = model.generate_batch(
        inputs,
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(page_size=8, **sizes),
    )
    assert [output.error for output in outputs.values()] == [None] * len(inputs)
    return [output.generated_tokens for output in outputs.values()]


def left_padded(model: Any, inputs: list[list[int]], new: int) -> list[list[int]]:
    """Return what ``generate`` gives for the same prompts as rows of one batch."""
    width = max(map(len, inputs))
    ids = torch.tensor([[0] * (width - len(own)) + own for own in inputs])
    out = model.generate(ids, attention_mask=(ids != 0).long(), do_sample=False, max_new_tokens=new)
    tokens: list[list[int]] = out[:, width:].tolist()
    return tokens


def test_more_lengths_at_once_than_stored_schedules_are_exact() -> None:
    """A request whose schedule was evicted between two of its tokens gets the same schedule again."""
    model = tiny.make("llama")
    inputs = [tiny.tokens(length, seed=length).tolist() for length in range(3, 70)]
    with posenc.apply(model, "lampe", window=32, replan=3, **LAMPE):
        got = batched(model, inputs, 6, num_blocks=900, max_batch_tokens=400, max_requests_per_batch=80)
        assert got == left_padded(model, inputs, 6)


SHARING: dict[str, tuple[str, dict[str, Any], bool]] = {
    "positions by distance alone": ("rerope", {"window_size": 12}, True),
    "short prompts are left alone": ("rerope", {"window_size": 12, "active_from": 84}, False),
    "frequencies by length": ("rerope", {"window_size": 12, "frequencies": {"name": "dynamic", "factor": 4}}, False),
    "positions by prompt": ("lampe", LAMPE, False),
}


@pytest.mark.parametrize("why", SHARING)
def test_prefixes_are_shared_only_if_they_have_the_same_values(why: str, caplog: pytest.LogCaptureFixture) -> None:
    name, params, shared = SHARING[why]
    model, reused = tiny.make("llama"), []
    start = tiny.tokens(80, seed=1).tolist()
    inputs = [start + tiny.tokens(extra, seed=extra).tolist() for extra in (1, 9, 30, 3, 14)]
    match = PagedAttentionCache.search_prefix_match

    def noted(self: Any, *args: Any) -> int:
        reused.append(match(self, *args))
        return reused[-1]

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.INFO, logger="posenc"):
        patch.setattr(PagedAttentionCache, "search_prefix_match", noted)
        with posenc.apply(model, name, **params):
            got = batched(model, inputs, 12, num_blocks=80, max_batch_tokens=48, max_requests_per_batch=1)
            assert got == [left_padded(model, [own], 12)[0] for own in inputs]
    assert any(length >= 72 for length in reused) == shared
    assert ("block sharing is off" in caplog.text) != shared
