"""The example of per-layer positions passes the contract and equals a dense float64 decoder whose layers differ."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import posenc
from posenc.hf.cache.state import CacheState
from tests.examples.load import example
from tests.hf import tiny
from tests.hf.dense import dense_logits

GroupedByLayer = example("positions_per_layer").GroupedByLayer
PROMPT, TOTAL = 90, 110


class TestContract(posenc.testing.StrategyContract):
    strategy = GroupedByLayer
    params = ({"near": 16}, {"near": 8, "lowest": 5, "highest": 2})


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding"])
def test_prefill_and_decode_equal_a_dense_computation(family: str) -> None:
    model, ids = tiny.make(family), tiny.tokens(1, TOTAL)
    groups = (2, 6)  # of the model's two layers
    at = []
    for group in groups:
        own = posenc.strategy("self_extend", group=group, window_size=16)
        at.append(tiny.positions(model, own, PROMPT, TOTAL))
    expected = dense_logits(model, ids[0], at)
    strategy = GroupedByLayer(window=tiny.WINDOW, lowest=2, highest=6, near=16, replan="never")
    with torch.no_grad(), posenc.apply(model, strategy) as handle:
        for one in (model, copy.deepcopy(model)):
            cache = DynamicCache(config=model.config)
            got = [one(ids[:, :PROMPT], past_key_values=cache).logits]
            got += [one(ids[:, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, TOTAL)]
            assert (torch.cat(got, 1)[0] - expected).abs().max() < 1e-4
        shown = [handle.plan(PROMPT, layer=layer).max_relative for layer in range(2)]
        assert shown == [
            posenc.strategy("self_extend", group=g, window_size=16).plan(PROMPT).max_relative for g in groups
        ]
        with pytest.raises(posenc.InvalidInputError, match=r"layer must be 0 \.\. 1"):
            handle.plan(PROMPT, layer=2)
    same = dense_logits(model, ids[0], at[0])
    assert (same - expected).abs().max() > 1e-2  # the layers do differ


def test_a_row_re_plans_when_one_of_its_layers_must() -> None:
    class OneLayerFollowsThePrompt(posenc.PositionStrategy):
        name, summary, paper = "mixed", "one layer re-plans", "none"

        def segments(self, lengths: posenc.Lengths):
            return posenc.strategy("rope").segments(lengths)

        def for_layer(self, layer: int, layers: int) -> posenc.PositionStrategy:
            return self if layer else posenc.strategy("lampe", window=64, head=8, tail=5, mapping=60)

    model, ids = tiny.make("llama"), tiny.tokens(1, 100)
    with torch.no_grad(), posenc.apply(model, OneLayerFollowsThePrompt(window=64)):
        cache = DynamicCache(config=model.config)
        model(ids[:, :60], past_key_values=cache)
        for i in range(60, 100):
            model(ids[:, i : i + 1], past_key_values=cache)
        (row,) = CacheState.of(cache).record.rows
    assert len(row.schedule.entries) > 1


def test_per_layer_positions_compose_with_frequencies() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, PROMPT)
    strategy = GroupedByLayer(window=64, lowest=2, highest=6, near=16)
    with torch.no_grad(), posenc.apply(model, strategy, frequencies={"name": "yarn", "factor": 4}) as handle:
        own = [handle.strategy.for_layer(layer, 2) for layer in range(2)]
        at = [tiny.positions(model, strategy, PROMPT, PROMPT) for strategy in own]
        assert (model(ids).logits[0] - dense_logits(model, ids[0], at)).abs().max() < 1e-4
    assert not (at[0].relative == at[1].relative).all()
    assert float(at[0].factor[0]) > 1
