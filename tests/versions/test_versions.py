"""Tests for the oldest and the newest transformers; ``make test-versions`` runs them with both.

Models are compared with the float64 decoder of tests/hf/dense.py. If versions of transformers differ, features decide,
never version numbers. The tests need only pytest and the dependencies of posenc.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.generation.continuous_batching import PagedAttentionCache

import posenc
from posenc.hf.transformers_names import cache_argument, output_cache, version
from tests.hf import tiny
from tests.hf.dense import dense_logits

TOLERANCE = 1e-4
PROMPT, STEPS = 90, 12
FAMILIES = ["llama", "qwen3", "mistral_sliding"]
REMAPS: dict[str, dict[str, Any]] = {
    "lampe": {"head": 8, "tail": 5, "mapping": 30, "replan": "never"},
    "rerope": {"window_size": 12, "replan": "never"},
}
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": STEPS}


def expected_logits(model: Any, strategy: posenc.PositionStrategy, tokens_L: Tensor, prompt: int) -> Tensor:
    """Return float64 logits [L, vocab] of a prompt and the tokens decoded after it."""
    return dense_logits(model, tokens_L, tiny.positions(model, strategy, prompt, len(tokens_L)))


def step_by_step(model: Any, ids_BL: Tensor, cache: Any, mask_BL: Tensor | None = None) -> Tensor:
    """Return logits [B, L, vocab] of a prefill of PROMPT tokens and of single tokens after it."""
    parts = []
    for low, high in [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, ids_BL.shape[1]))]:
        mask = None if mask_BL is None else mask_BL[:, :high]
        out = model(ids_BL[:, low:high], attention_mask=mask, use_cache=True, **cache_argument(model, cache))
        assert output_cache(out) is cache
        parts.append(out.logits)
    return torch.cat(parts, 1)


def test_the_identity_equals_the_model() -> None:
    for family in FAMILIES:
        model, ids = tiny.make(family), tiny.tokens(2, PROMPT)

        def use(model: Any = model, ids: Tensor = ids) -> tuple[Tensor, Tensor, Tensor]:
            return model(ids).logits, model.generate(ids, **GREEDY), model.generate(ids, num_beams=2, **GREEDY)

        with torch.no_grad():
            stock = use()
            with posenc.apply(model, "rope"):
                identity = use()
            assert all(map(torch.equal, identity, stock)), family
            assert all(map(torch.equal, use(), stock)), f"{family} after the strategy was removed"


@pytest.mark.parametrize("name", REMAPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_remap_equals_the_dense_decoder(family: str, name: str) -> None:
    model, strategy = tiny.make(family), posenc.strategy(name, window=tiny.WINDOW, **REMAPS[name])
    ids = tiny.tokens(1, PROMPT + STEPS)
    at_once, decoded = (expected_logits(model, strategy, ids[0], prompt) for prompt in (PROMPT + STEPS, PROMPT))
    caches = {
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=PROMPT + STEPS + 3),
    }
    with torch.no_grad(), posenc.apply(model, strategy):
        assert (model(ids, use_cache=False).logits[0] - at_once).abs().max() < TOLERANCE
        for kind, cache in caches.items():
            assert (step_by_step(model, ids, cache)[0] - decoded).abs().max() < TOLERANCE, kind


@pytest.mark.parametrize("name", REMAPS)
def test_padded_rows_give_the_same_as_alone(name: str) -> None:
    model, strategy = tiny.make("llama"), posenc.strategy(name, window=tiny.WINDOW, **REMAPS[name])
    lengths = (PROMPT, 70, 11)
    ids, mask = tiny.tokens(3, PROMPT + STEPS), torch.ones(3, PROMPT + STEPS, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : PROMPT - length] = 0
    with torch.no_grad(), posenc.apply(model, strategy):
        logits = step_by_step(model, ids * mask, DynamicCache(config=model.config), mask)
    for row, length in enumerate(lengths):
        start = PROMPT - length
        expected = expected_logits(model, strategy, ids[row, start:], length)
        assert (logits[row, start:] - expected).abs().max() < TOLERANCE, f"row {row}"


@pytest.mark.parametrize("implementation", [None, "static"])
def test_generate_takes_the_most_likely_token_of_the_dense_logits(implementation: str | None) -> None:
    model, strategy = tiny.make("llama"), posenc.strategy("rerope", window=tiny.WINDOW, **REMAPS["rerope"])
    ids = tiny.tokens(1, PROMPT)
    with posenc.apply(model, strategy):
        out = model.generate(ids, cache_implementation=implementation, disable_compile=True, **GREEDY)
    assert out.shape[1] == PROMPT + STEPS
    expected = expected_logits(model, strategy, out[0], PROMPT)
    assert torch.equal(out[0, PROMPT:], expected[PROMPT - 1 : -1].argmax(-1))


def test_continuous_batching_equals_generate_or_is_refused() -> None:
    model, prompts = tiny.make("llama"), [tiny.tokens(length, seed=length).tolist() for length in (5, 90, 33)]
    settings = {
        "generation_config": GenerationConfig(**GREEDY, eos_token_id=-1, pad_token_id=0),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=80, max_batch_tokens=48),
    }
    layers_update_the_cache = "kwargs" in inspect.signature(PagedAttentionCache.update).parameters
    with posenc.apply(model, "rerope", **REMAPS["rerope"]):
        if layers_update_the_cache:
            outputs = model.generate_batch(prompts, **settings).values()
            alone = [model.generate(torch.tensor([row]), **GREEDY)[0, len(row) :].tolist() for row in prompts]
            assert [(output.error, output.generated_tokens) for output in outputs] == [(None, row) for row in alone]
        else:
            with pytest.raises(posenc.UnsupportedModelError, match=version()):
                model.init_continuous_batching(**settings)
