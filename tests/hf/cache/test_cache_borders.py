"""Changes between two forwards on a cache: position ids that jump, keys in another view, another announced plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import posenc
from tests.hf import tiny
from tests.hf.tiny import LAMPE

PROMPT = 80
TOLERANCE = 1e-4
JUMPS: dict[str, tuple[int, ...]] = {
    "a gap before one token": (85,),
    "a gap before a turn": (85, 86, 87),
    "the same id again": (79,),
    "from the start again": (0, 1, 2),
}


def after_prompt(model: Any, ids: tuple[int, ...], rows: int = 1, jumping: int | None = None) -> Tensor:
    """Return logits of tokens after a prompt, with these position ids in row ``jumping``, or in all rows."""
    cache, new = DynamicCache(config=model.config), len(ids)
    tokens = tiny.tokens(rows, PROMPT + new)
    position_ids = torch.arange(PROMPT, PROMPT + new).expand(rows, -1).clone()
    position_ids[slice(None) if jumping is None else jumping] = torch.tensor(ids)
    with torch.no_grad():
        model(tokens[:, :PROMPT], past_key_values=cache)
        logits: Tensor = model(tokens[:, PROMPT:], position_ids=position_ids, past_key_values=cache).logits
    return logits


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("name", ["lampe", "rerope"])
def test_position_ids_that_jump_between_two_forwards_are_refused(name: str, jump: str) -> None:
    model = tiny.make("llama")
    with posenc.apply(model, name, **(LAMPE if name == "lampe" else {"window_size": 12})):
        for rows, jumping in ((1, None), (3, None), (3, 1)):
            with pytest.raises(posenc.InvalidInputError, match="count up by one"):
                after_prompt(model, JUMPS[jump], rows, jumping)
        after_prompt(model, (PROMPT, PROMPT + 1))


@pytest.mark.parametrize("jump", JUMPS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_identity_uses_the_given_position_ids(family: str, jump: str) -> None:
    model = tiny.make(family)
    for rows, jumping in ((1, None), (3, 1)):
        stock = after_prompt(model, JUMPS[jump], rows, jumping)
        with posenc.apply(model, "rope"):
            assert torch.equal(after_prompt(model, JUMPS[jump], rows, jumping), stock)


def heads_for_rows(keys: Tensor) -> Tensor:
    return keys.transpose(0, 1)


def first_row_for_all(keys: Tensor) -> Tensor:
    return keys[:1].expand_as(keys)


def first_head_for_all(keys: Tensor) -> Tensor:
    return keys[:, :1].expand_as(keys)


@pytest.mark.parametrize("seen_as", [heads_for_rows, first_row_for_all, first_head_for_all])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_same_memory_with_other_strides_counts_as_other_keys(
    seen_as: Callable[[Tensor], Tensor], layer: int
) -> None:
    """Rotated copies are made again: the results equal those without copies, or both modes refuse."""
    model, ids = tiny.make("llama"), tiny.tokens(2, PROMPT + 4)
    outcomes = []
    for mode in ("rotated", "raw"):
        with torch.no_grad(), posenc.apply(model, "lampe", cache=mode, **LAMPE):
            cache = DynamicCache(config=model.config)
            model(ids[:, :PROMPT], past_key_values=cache)
            for i in (0, 1):
                model(ids[:, PROMPT + i : PROMPT + i + 1], past_key_values=cache)
            cache.layers[layer].keys = seen_as(cache.layers[layer].keys)
            try:
                parts = [model(ids[:, PROMPT + i : PROMPT + i + 1], past_key_values=cache).logits for i in (2, 3)]
                outcomes.append(torch.cat(parts, 1))
            except posenc.CacheMismatchError:
                outcomes.append(torch.zeros(0))
    rotated, raw = outcomes
    assert rotated.shape == raw.shape
    assert not rotated.numel() or (rotated - raw).abs().max() < TOLERANCE


def decoded(model: Any, handle: posenc.Handle, step: Any, cache: Any, ids: Tensor, announced: int) -> Tensor:
    """Return logits of tokens after a prompt whose length is announced only with its last token."""
    with torch.no_grad():
        model(ids[:, : PROMPT - 1], past_key_values=cache)
        with handle.prompt_length(announced):
            model(ids[:, PROMPT - 1 : PROMPT], past_key_values=cache)
        parts = [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, ids.shape[1])]
    return torch.cat(parts, 1)


def test_a_compiled_step_uses_the_plan_that_was_announced_last() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, PROMPT + 5)
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager", fullgraph=True)
    with posenc.apply(model, "lampe", replan="never", **LAMPE) as handle:
        static = StaticCache(config=model.config, max_cache_len=PROMPT + 9)
        got = decoded(model, handle, step, static, ids, announced=150)
        expected = decoded(model, handle, model, DynamicCache(config=model.config), ids, announced=150)
    assert (got - expected).abs().max() < TOLERANCE
