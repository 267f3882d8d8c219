"""Run requests through ``generate_batch``, for tests of continuous batching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import PagedAttentionCache


def greedy(new: int) -> GenerationConfig:
    """Return the settings of greedy generation of exactly ``new`` tokens."""
    return GenerationConfig(do_sample=False, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)


def batched(model: Any, inputs: list[list[int]], new: int, settings: ContinuousBatchingConfig) -> list[list[int]]:
    """Return the tokens that ``generate_batch`` adds to each prompt; every request must succeed."""
    outputs = model.generate_batch(inputs, generation_config=greedy(new), continuous_batching_config=settings)
    assert [output.error for output in outputs.values()] == [None] * len(inputs)
    return [output.generated_tokens for output in outputs.values()]


@contextmanager
def reused_prefixes() -> Iterator[list[int]]:
    """Collect how many tokens each request takes from blocks of equal prefixes, while the block runs."""
    lengths: list[int] = []
    match = PagedAttentionCache.search_prefix_match

    def noted(self: Any, *args: Any) -> int:
        lengths.append(match(self, *args))
        return lengths[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagedAttentionCache, "search_prefix_match", noted)
        yield lengths
