"""Every strategy on every family equals the dense float64 decoder: prefill, decode, batches, chunks."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import posenc
from tests.hf import tiny
from tests.hf.dense import dense_logits

TOLERANCE = 1e-4
PROMPT, STEPS = 90, 40

# parameters by strategy; every registered strategy must be listed, so that no new one is forgotten
PARAMS: dict[str, dict[str, object]] = {
    "rope": {},
    "lampe": tiny.LAMPE,
    "self_extend": {"group": 4, "window_size": 16},
    "rerope": {"window_size": 12},
    "leaky_rerope": {"window_size": 12, "factor": 5},
    "dca": {"chunk_size": 40, "local_size": 12},
    "string": {"shift": 20, "window_size": 6},
    "lm_infinite": {"window_size": 30, "sinks": 4},
    "streaming_llm": {"window_size": 30, "sinks": 4},
    "dpe": {"window_size": 10},
    "linear": {"factor": 4},
    "dynamic": {"factor": 4},
    "ntk": {"factor": 4},
    "yarn": {"factor": 4},
    "llama3": {"factor": 4},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [1.0 + i / 2 for i in range(8)]},
    "auto": {
        "calibration": {
            "ranges": [
                {"up_to": 16, "pick": {"strategy": "rope", "because": "short"}},
                {"up_to": 75, "pick": {"strategy": "rerope", "params": {"window_size": 12}, "because": "longer"}},
                {"up_to": 999, "pick": {"strategy": "dca", "params": {"chunk_size": 40}, "because": "longest"}},
            ]
        }
    },
}
REMAPS = [name for name, info in posenc.strategies().items() if not info.capabilities.changes_frequencies]
NAMES = list(posenc.strategies())


def make(name: str, **extra: object) -> posenc.PositionStrategy:
    return posenc.strategy(name, window=tiny.WINDOW, **{**PARAMS[name], **extra})


def test_every_strategy_is_listed() -> None:
    assert set(PARAMS) == set(posenc.strategies())


def without_replan(name: str) -> posenc.PositionStrategy:
    return make(name, **({"replan": "never"} if name in REMAPS else {}))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decoding_equal_the_dense_decoder(family: str, name: str) -> None:
    model, strategy = tiny.make(family), without_replan(name)
    ids = tiny.tokens(1, PROMPT + STEPS)
    expected = dense_logits(model, ids[0], tiny.positions(model, strategy, PROMPT, PROMPT + STEPS))
    with torch.no_grad(), posenc.apply(model, strategy):
        got = tiny.decoded(model, ids, PROMPT, DynamicCache(config=model.config))
    assert (got[0] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_left_padded_rows_equal_the_dense_decoder(family: str, name: str) -> None:
    model, strategy = tiny.make(family), without_replan(name)
    lengths = (PROMPT, 70, 11)
    steps = 12
    ids = tiny.tokens(3, PROMPT + steps)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : PROMPT - length] = 0
    with torch.no_grad(), posenc.apply(model, strategy):
        logits = tiny.decoded(model, ids, PROMPT, DynamicCache(config=model.config), mask)
    for row, length in enumerate(lengths):
        at = tiny.positions(model, strategy, length, length + steps)
        expected = dense_logits(model, ids[row, PROMPT - length :], at)
        assert (logits[row, PROMPT - length :] - expected).abs().max() < TOLERANCE, f"row {row}"


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_chunked_prefill_uses_the_announced_length(family: str, name: str) -> None:
    model, strategy = tiny.make(family), without_replan(name)
    ids = tiny.tokens(1, PROMPT + 2)
    expected = dense_logits(model, ids[0], tiny.positions(model, strategy, PROMPT, PROMPT + 2))
    with torch.no_grad(), posenc.apply(model, strategy) as handle:
        cache = DynamicCache(config=model.config)
        with handle.prompt_length(PROMPT):
            got = [
                model(ids[:, low : min(low + 37, PROMPT)], past_key_values=cache).logits for low in range(0, PROMPT, 37)
            ]
        got += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (PROMPT, PROMPT + 1)]
    assert (torch.cat(got, 1)[0] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "qwen3"])
@pytest.mark.parametrize("name", ["lampe", "self_extend", "dca"])
def test_a_new_turn_plans_with_the_new_length(family: str, name: str) -> None:
    model, strategy = tiny.make(family), make(name)
    first, total = 50, 110
    ids = tiny.tokens(1, total)
    with torch.no_grad(), posenc.apply(model, strategy):
        cache = DynamicCache(config=model.config)
        model(ids[:, :first], past_key_values=cache)
        got = model(ids[:, first:], past_key_values=cache).logits[0]
    # the first turn was computed under its own plan, so its rows of the dense positions are replaced
    before = tiny.positions(model, strategy, first, total)
    after = tiny.positions(model, strategy, total, total)
    after.relative[:first] = before.relative[:first]
    after.scale[:first] = before.scale[:first]
    assert (got - dense_logits(model, ids[0], after)[first:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "mistral_sliding"])
@pytest.mark.parametrize("name", ["lampe", "dca", "rerope"])
def test_a_static_cache_equals_the_dense_decoder(family: str, name: str) -> None:
    model, strategy = tiny.make(family), without_replan(name)
    ids = tiny.tokens(2, PROMPT + 6)
    with torch.no_grad(), posenc.apply(model, strategy):
        logits = tiny.decoded(model, ids, PROMPT, StaticCache(config=model.config, max_cache_len=PROMPT + 20))
    at = tiny.positions(model, strategy, PROMPT, PROMPT + 6)
    for row in range(2):
        assert (logits[row] - dense_logits(model, ids[row], at)).abs().max() < TOLERANCE


def test_a_remap_composes_with_frequencies() -> None:
    model = tiny.make("llama")
    ids = tiny.tokens(1, PROMPT)
    with (
        torch.no_grad(),
        posenc.apply(model, "rerope", window_size=12, frequencies={"name": "yarn", "factor": 4}) as handle,
    ):
        got = model(ids).logits[0]
        at = tiny.positions(model, handle.strategy, PROMPT, PROMPT)
    assert bool((at.factor > 1).all())
    assert (got - dense_logits(model, ids[0], at)).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["lm_infinite", "streaming_llm"])
def test_keys_dropped_inside_a_sliding_window_are_dropped(name: str) -> None:
    # all remaining distances are true ones, but stock attention would also attend the keys that the plan drops
    model = tiny.make("mistral_sliding")
    strategy, ids = posenc.strategy(name, window=tiny.WINDOW, window_size=10, sinks=0), tiny.tokens(1, 60)
    expected = dense_logits(model, ids[0], tiny.positions(model, strategy, 60, 60))
    with torch.no_grad(), posenc.apply(model, strategy):
        assert (model(ids).logits[0] - expected).abs().max() < TOLERANCE
