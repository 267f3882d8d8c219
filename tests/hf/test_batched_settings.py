"""Continuous batching of many requests: they share prefixes exactly when the keys have the same values."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig

import posenc
from tests.hf import tiny
from tests.hf.batches import batched, reused_prefixes

LAMPE: dict[str, Any] = {"head": 4, "tail": 3, "mapping": 10}


def left_padded(model: Any, inputs: list[list[int]], new: int) -> list[list[int]]:
    """Return what ``generate`` gives for the same prompts as rows of one batch."""
    width = max(map(len, inputs))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in inputs])
    out = model.generate(ids, attention_mask=(ids != 0).long(), do_sample=False, max_new_tokens=new)
    tokens: list[list[int]] = out[:, width:].tolist()
    return tokens


def test_more_lengths_at_once_than_stored_schedules_are_exact() -> None:
    """A request whose schedule was evicted between two of its tokens gets the same schedule again."""
    model = tiny.make("llama")
    inputs = [tiny.tokens(length, seed=length).tolist() for length in range(3, 70)]
    settings = ContinuousBatchingConfig(page_size=8, num_blocks=900, max_batch_tokens=400, max_requests_per_batch=80)
    with posenc.apply(model, "lampe", window=32, replan=3, **LAMPE):
        assert batched(model, inputs, 6, settings) == left_padded(model, inputs, 6)


SHARING: dict[str, tuple[str, dict[str, Any], bool]] = {
    "positions by distance alone": ("rerope", {"window_size": 12}, True),
    "short prompts are left alone": ("rerope", {"window_size": 12, "active_from": 84}, False),
    "frequencies by length": ("rerope", {"window_size": 12, "frequencies": {"name": "dynamic", "factor": 4}}, False),
    "positions by prompt": ("lampe", LAMPE, False),
}


@pytest.mark.parametrize("why", SHARING)
def test_prefixes_are_shared_only_if_they_have_the_same_values(why: str, caplog: pytest.LogCaptureFixture) -> None:
    name, params, shared = SHARING[why]
    model, start = tiny.make("llama"), tiny.tokens(80, seed=1).tolist()
    inputs = [start + tiny.tokens(extra, seed=extra).tolist() for extra in (1, 9, 30, 3, 14)]
    settings = ContinuousBatchingConfig(page_size=8, num_blocks=80, max_batch_tokens=48, max_requests_per_batch=1)
    with (
        reused_prefixes() as reused,
        caplog.at_level(logging.INFO, logger="posenc"),
        posenc.apply(model, name, **params),
    ):
        got = batched(model, inputs, 12, settings)
        assert got == [left_padded(model, [prompt], 12)[0] for prompt in inputs]
    assert any(length >= 72 for length in reused) == shared
    assert ("block sharing is off" in caplog.text) != shared
