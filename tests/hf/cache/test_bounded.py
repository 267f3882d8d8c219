"""A bounded cache gives the same logits as a cache of all tokens, and stays small."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache, SmolLM3Config, SmolLM3ForCausalLM

import posenc
from posenc import Lengths, Retention, Segment
from posenc.hf.cache.state import CacheState
from posenc.kernels.rotated_key_cache import ROOM
from tests.hf import tiny

STRATEGIES: list[tuple[str, dict[str, Any]]] = [
    ("streaming_llm", {"window_size": 20, "sinks": 3}),
    ("streaming_llm", {"window_size": 20, "sinks": 0}),
    ("lm_infinite", {"window_size": 20, "sinks": 5}),
]


class NearestOnly(posenc.PositionStrategy):
    """A strategy as a third party might write it: no sinks, doubled distances."""

    name = "nearest_only"
    summary = "the nearest 9 keys at double distance"
    paper = "an example"
    capabilities = posenc.Capabilities(drops_keys=True)

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        index = lengths.indices
        return (Segment.band("near", lengths.total, 0, 9, 2 * index, 2 * index),)

    @property
    def retention(self) -> Retention:
        return Retention(0, 9)


def held(cache: Any) -> int:
    """Return the largest number of slots in any tensor of the cache or of its record."""
    sizes = [x.shape[2] for layer in cache.layers for x in (layer.keys, layer.values)]
    return max([*sizes, CacheState.of(cache).record.slots])


def left_padded(rows: int, width: int, seed: int) -> dict[str, torch.Tensor]:
    ids = tiny.tokens(rows, width, seed=seed)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : row * width // rows] = 0
    return {"input_ids": ids, "attention_mask": mask}


def both(model: Any, handle: posenc.Handle, turns: list[dict[str, torch.Tensor]], decoded: int, slack: int) -> int:
    """Run turns and decoding on both caches, compare every logit, and return the largest size of the bounded one."""
    bounded, whole = handle.bounded_cache(slack=slack), DynamicCache(config=model.config)
    mask, most = turns[0]["attention_mask"][:, :0], 0
    seed = 0
    for turn in turns:
        steps = [(turn["input_ids"], turn["attention_mask"])]
        for _ in range(decoded):
            seed += 1
            ids = tiny.tokens(len(mask), 1, seed=seed)
            steps.append((ids, torch.ones_like(ids)))
        for ids, real in steps:
            mask = torch.cat((mask, real), 1)
            position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits = [
                model(ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache).logits
                for cache in (bounded, whole)
            ]
            difference = (logits[0] - logits[1]).abs().amax(-1)[real.bool()]
            assert difference.max() < 1e-4
            assert bounded.get_seq_length() == mask.shape[1]
            most = max(most, held(bounded))
    assert held(whole) == mask.shape[1] or model.config.sliding_window
    return most


@pytest.mark.parametrize("family", ["llama", "qwen2_sliding"])
@pytest.mark.parametrize(("name", "params"), STRATEGIES)
def test_logits_are_those_of_a_cache_of_all_tokens(family: str, name: str, params: dict[str, Any]) -> None:
    model = tiny.make(family)
    turns = [left_padded(3, 40, 1), left_padded(3, 15, 2), left_padded(3, 5, 3)]
    turns[1]["attention_mask"][:] = 1
    with torch.no_grad(), posenc.apply(model, name, **params) as handle:
        most = both(model, handle, turns, decoded=40, slack=10)
    last = 24 if family == "qwen2_sliding" else 20  # the model's sliding window is larger
    assert most == params["sinks"] + last + 10


@pytest.mark.parametrize(("cache", "slack"), [("rotated", 0), ("rotated", 7), ("raw", 7)])
def test_short_rows_stay_exact_in_long_generation(cache: str, slack: int) -> None:
    model = tiny.make("llama")
    with torch.no_grad(), posenc.apply(model, "streaming_llm", cache=cache, window_size=8, sinks=2) as handle:
        assert both(model, handle, [left_padded(4, 12, 1)], decoded=120, slack=slack) == 10 + slack


def test_padding_inside_a_row_is_dropped_too() -> None:
    model = tiny.make("llama")
    right = left_padded(3, 80, 1)
    right["attention_mask"][:, :] = 1
    right["attention_mask"][:2, 20:] = 0
    right["attention_mask"][2, 35:] = 0  # the plans of all rows are the identity
    with torch.no_grad(), posenc.apply(model, "streaming_llm", window_size=60, sinks=4) as handle:
        assert both(model, handle, [right, left_padded(3, 10, 2)], decoded=40, slack=0) <= 80


def test_a_sliding_window_inside_the_retained_keys_is_exact() -> None:
    model = tiny.make("qwen2_sliding")
    with torch.no_grad(), posenc.apply(model, "streaming_llm", window_size=30, sinks=2) as handle:
        assert both(model, handle, [left_padded(3, 50, 1)], decoded=60, slack=3) == 35


def test_a_strategy_of_a_third_party_is_bounded() -> None:
    model = tiny.make("llama")
    with torch.no_grad(), posenc.apply(model, NearestOnly()) as handle:
        assert both(model, handle, [left_padded(2, 30, 1)], decoded=60, slack=5) == 14


def test_generate_and_chunked_prefill_equal_a_cache_of_all_tokens() -> None:
    model = tiny.make("llama")
    inputs = left_padded(3, 50, 4)
    with torch.no_grad(), posenc.apply(model, "streaming_llm", window_size=16, sinks=2) as handle:
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=100)
        for options in ({}, {"prefill_chunk_size": 7}):
            cache = handle.bounded_cache()
            got = model.generate(**inputs, **options, past_key_values=cache, do_sample=False, max_new_tokens=100)
            assert torch.equal(got, expected)
            assert held(cache) <= 2 + 16 + 64
        with handle.prompt_length(30):  # an announced length does not change plans that do not depend on it
            first = handle.bounded_cache()
            chunks = [model(tiny.tokens(1, 30)[:, i : i + 10], past_key_values=first).logits for i in (0, 10, 20)]
        whole = model(tiny.tokens(1, 30)).logits
        assert (torch.cat(chunks, 1) - whole).abs().max() < 1e-4
        beams = {"do_sample": False, "num_beams": 3, "max_new_tokens": 60}
        expected = model.generate(**inputs, **beams)
        assert torch.equal(model.generate(**inputs, **beams, past_key_values=handle.bounded_cache(slack=0)), expected)


def test_no_state_of_posenc_grows_with_the_text() -> None:
    model = tiny.make("llama")
    with torch.no_grad(), posenc.apply(model, "streaming_llm", window_size=8, sinks=2, replan=7) as handle:
        cache = handle.bounded_cache(slack=4)
        for i in range(700):
            model(tiny.tokens(2, 3, seed=i), past_key_values=cache)
        copies = 0
        for i in range(300):
            model(tiny.tokens(2, 1, seed=i), past_key_values=cache)
            copies = max(copies, CacheState.of(cache).rotated.bytes)
        record, planner = CacheState.of(cache).record, handle._attachment.planner
    assert cache.get_seq_length() == 2400
    assert record.rows[0].dropped + record.rows[0].length == 2400
    assert record.position_ids_BT.shape[1] <= 14
    assert max(len(row.schedule.entries) for row in record.rows) <= 14
    assert max(plan.total for plan in planner._plans.values()) < 400
    one_copy = 14 + ROOM  # slots in a buffer of rotated keys
    assert 0 < copies <= 2 * 2 * one_copy * cache.layers[0].keys[:, :, :1].nbytes


def test_copies_work_and_changed_padding_is_refused() -> None:
    model = tiny.make("llama")
    inputs = left_padded(2, 50, 4)
    with torch.no_grad(), posenc.apply(model, "streaming_llm", window_size=16, sinks=2) as handle:
        cache = handle.bounded_cache(slack=0)
        model(**inputs, past_key_values=cache)
        branch = copy.deepcopy(cache)
        for i in range(5):
            model(tiny.tokens(2, 1, seed=i), past_key_values=cache)
        assert (branch.get_seq_length(), cache.get_seq_length()) == (50, 55)
        wrong = torch.cat((inputs["attention_mask"] * 0, torch.ones(2, 1)), 1)
        with pytest.raises(posenc.InvalidInputError, match="hides or reveals"):
            model(tiny.tokens(2, 1), attention_mask=wrong, past_key_values=branch)
        again = torch.cat((inputs["attention_mask"], torch.ones(2, 1)), 1)
        model(tiny.tokens(2, 1), attention_mask=again, past_key_values=branch)
        branch.reset()
        model(**inputs, past_key_values=branch)
        assert branch.get_seq_length() == 50


@pytest.mark.parametrize(
    ("name", "params", "reason"),
    [
        ("rerope", {}, "may attend every key again"),
        ("streaming_llm", {"active_from": 64}, "active_from"),
        ("streaming_llm", {"frequencies": "dynamic"}, "follows the length"),
    ],
)
def test_strategies_that_need_every_key_are_refused(name: str, params: dict[str, Any], reason: str) -> None:
    with posenc.apply(tiny.make("llama"), name, **params) as handle, pytest.raises(posenc.PosencError, match=reason):
        handle.bounded_cache()


def test_layers_without_rotary_positions_are_refused() -> None:
    config = SmolLM3Config(**tiny.SHAPE, no_rope_layers=[1, 0], use_sliding_window=False)
    with (
        posenc.apply(SmolLM3ForCausalLM(config).eval(), "streaming_llm") as handle,
        pytest.raises(posenc.UnsupportedModelError, match="without rotary positions"),
    ):
        handle.bounded_cache()


def test_misuse_is_refused() -> None:
    model = tiny.make("llama")
    ids = tiny.tokens(1, 60)
    with torch.no_grad():
        with posenc.apply(model, "streaming_llm", window_size=16) as handle:
            with pytest.raises(posenc.InvalidConfigError, match="slack"):
                handle.bounded_cache(slack=-1)
            cache, fresh = handle.bounded_cache(slack=0), handle.bounded_cache()
            model(ids, past_key_values=cache)
            with pytest.raises(posenc.CacheMismatchError, match="cannot be cut back"):
                cache.crop(-1)
            with pytest.raises(posenc.InvalidInputError, match="4-D"):
                model(ids[:, :1], attention_mask=torch.ones(1, 1, 1, 61, dtype=torch.bool), past_key_values=cache)
            broken = handle.bounded_cache(slack=0)
            down = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids, past_key_values=broken)
            down.remove()
            model.model.layers[1].self_attn.forward, kept = None, model.model.layers[1].self_attn.forward
            broken = handle.bounded_cache(slack=0)
            with pytest.raises(TypeError):
                model(ids, past_key_values=broken)
            model.model.layers[1].self_attn.forward = kept
            with pytest.raises(posenc.CacheMismatchError, match="broke off"):
                model(ids[:, :1], past_key_values=broken)
        with posenc.apply(model, "lm_infinite"), pytest.raises(posenc.CacheMismatchError, match="was made for"):
            model(ids, past_key_values=fresh)
