"""Changes to a cache between two forwards: harmless ones are served, the others are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import posenc
from posenc.hf.transformers_names import cache_argument
from tests.hf import tiny

STRATEGIES: dict[str, dict[str, Any]] = {
    "rope": {},
    "yarn": {"factor": 4.0},
    "rerope": {"window_size": 9},
    "self_extend": {"group": 4, "window_size": 16},
    "lampe": tiny.LAMPE,
}
EVERY = pytest.mark.parametrize("name", list(STRATEGIES))
PROMPT = 80


def run(model: Any, ids: Tensor, cache: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, **cache_argument(model, cache), **kwargs).logits
    return logits


def turn(model: Any, ids: Tensor, cache: Any) -> None:
    """Run a prompt of 50 tokens, and decode the others one by one."""
    run(model, ids[:, :50], cache)
    for index in range(50, ids.shape[1]):
        run(model, ids[:, index : index + 1], cache)


def dropped(cache: Any, keep: Tensor) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = (x[:, :, keep].contiguous() for x in (layer.keys, layer.values))


@EVERY
@pytest.mark.parametrize("gone", [range(10, 40), range(0, 1), range(74, 79), range(2, 79)])
def test_keys_dropped_from_the_middle_are_refused(name: str, gone: range) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, PROMPT)
    keep = torch.tensor([slot for slot in range(PROMPT) if slot not in gone])
    with posenc.apply(model, name, **STRATEGIES[name]):
        cache = DynamicCache()
        run(model, ids, cache)
        dropped(cache, keep)
        with pytest.raises(posenc.CacheMismatchError, match="middle"):
            run(model, ids[:, :1], cache)


def test_keys_dropped_while_the_forward_runs_are_refused() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, PROMPT)

    def compress(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        layer = cache.layers[module.layer_idx]
        layer.keys, layer.values = layer.keys[:, :, 30:], layer.values[:, :, 30:]

    with posenc.apply(model, "rerope", **STRATEGIES["rerope"]):
        cache = DynamicCache()
        hooks = [layer.self_attn.register_forward_hook(compress, with_kwargs=True) for layer in model.model.layers]
        run(model, ids, cache)
        for hook in hooks:
            hook.remove()
        with pytest.raises(posenc.CacheMismatchError, match="middle"):
            run(model, ids[:, :1], cache)


def test_keys_dropped_from_one_layer_are_refused() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, PROMPT)
    with posenc.apply(model, "rerope", **STRATEGIES["rerope"]):
        for layer in (0, 1):
            cache = DynamicCache()
            run(model, ids, cache)
            pruned = cache.layers[layer]
            pruned.keys, pruned.values = pruned.keys[:, :, 30:], pruned.values[:, :, 30:]
            with pytest.raises(posenc.CacheMismatchError):
                run(model, ids[:, :1], cache)


@EVERY
def test_a_crop_is_served(name: str) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, PROMPT)
    with posenc.apply(model, name, **STRATEGIES[name]):
        whole, cut = DynamicCache(), DynamicCache()
        for cache in (whole, cut):
            run(model, ids[:, :70], cache)
        run(model, ids[:, 70:71], cut)
        cut.crop(-1)
        twin = copy.deepcopy(cut)  # a copy has no record of its keys, but they are the same
        expected = run(model, ids[:, 70:71], whole)
        for cache in (cut, twin):
            assert (run(model, ids[:, 70:71], cache) - expected).abs().max() < 1e-4


CHANGES: dict[str, tuple[Callable[[Any], Any], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@EVERY
@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("unequal", ["padding", "position ids"])
def test_moved_rows_keep_their_own_state(name: str, change: str, unequal: str) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(3, 70)
    mask = torch.ones_like(ids)
    at = torch.arange(70).repeat(3, 1)
    if unequal == "padding":
        mask[0, :9], mask[2, :30] = 0, 0
        at = (mask.cumsum(1) - 1).clamp(min=0)
    else:
        at = at + torch.tensor([[0], [20], [7]])
    move, rows = CHANGES[change]
    token = tiny.tokens(3, 1, seed=5)
    more, after = torch.cat((mask, torch.ones(3, 1).long()), 1), at[:, -1:] + 1
    with posenc.apply(model, name, **STRATEGIES[name]):
        kept, moved = DynamicCache(), DynamicCache()
        for cache in (kept, moved):
            run(model, ids, cache, attention_mask=mask, position_ids=at)
        move(moved)
        expected = run(model, token, kept, attention_mask=more, position_ids=after)[rows]
        got = run(model, token[rows], moved, attention_mask=more[rows], position_ids=after[rows])
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("same_tokens", [True, False])
@pytest.mark.parametrize("inference", [True, False])
def test_a_cache_filled_by_an_unpatched_model_is_refused(kind: str, same_tokens: bool, inference: bool) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 50)
    other = ids if same_tokens else tiny.tokens(1, 50, seed=9)
    with torch.inference_mode(inference):
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=90)
        with posenc.apply(model, "self_extend", **STRATEGIES["self_extend"]):
            run(model, ids, cache)
        cache.reset() if kind == "static" else cache.crop(-50)
        run(model, other[:, :49], cache)
        with (
            posenc.apply(model, "self_extend", **STRATEGIES["self_extend"]),
            pytest.raises(posenc.CacheMismatchError),
        ):
            run(model, other[:, 49:], cache)


@pytest.mark.parametrize("kind", ["dynamic", "static", "bounded"])
@pytest.mark.parametrize("where", [0, 1])
def test_a_cache_is_refused_after_a_forward_that_failed_between_layers(kind: str, where: int) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 60)

    def stop(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    bounded = ("streaming_llm", {"window_size": 12, "sinks": 2})
    name, params = bounded if kind == "bounded" else ("lampe", {"mapping": 30})
    with posenc.apply(model, name, **params) as handle:
        makers = {
            "dynamic": DynamicCache,
            "static": lambda: StaticCache(config=model.config, max_cache_len=90),
            "bounded": lambda: handle.bounded_cache(slack=200),
        }
        whole, broken = makers[kind](), makers[kind]()
        for cache in (whole, broken):
            run(model, ids[:, :40], cache)
        hook = model.model.layers[where].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            run(model, ids[:, 40:41], broken)
        hook.remove()
        if where == 0:  # no layer had started, so the token can be run again
            expected = run(model, ids[:, 40:41], whole)
            assert (run(model, ids[:, 40:41], broken) - expected).abs().max() < 1e-5
        else:
            with pytest.raises(posenc.CacheMismatchError):
                run(model, ids[:, 40:41], broken)


@EVERY
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padding_of_the_first_turn_is_hidden_in_the_second(name: str, kind: str) -> None:
    """Row 0 ended early, and ``generate`` continued it with padding that counted as tokens until the next turn."""
    model, ids = tiny.make("llama"), tiny.tokens(2, 90)
    with posenc.apply(model, name, **STRATEGIES[name]):
        cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=99)
        turn(model, ids[:, :70], cache)
        mask = torch.ones(2, 90).long()
        mask[0, 60:70] = 0
        at = mask.cumsum(1) - 1
        got = run(model, ids[:, 70:89], cache, attention_mask=mask[:, :89], position_ids=at[:, 70:89])
        last = run(model, ids[:, 89:], cache, attention_mask=mask, position_ids=at[:, 89:])
        for row, length in ((0, 60), (1, 70)):
            alone = DynamicCache()
            turn(model, ids[row : row + 1, :length], alone)
            expected = run(model, ids[row : row + 1, 70:89], alone)
            assert (got[row : row + 1] - expected).abs().max() < 1e-4
            assert (last[row : row + 1] - run(model, ids[row : row + 1, 89:], alone)).abs().max() < 1e-4


def test_revealing_padding_later_is_refused() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with posenc.apply(model, "rerope", **STRATEGIES["rerope"]):
        cache = DynamicCache()
        run(model, ids, cache, attention_mask=mask)
        with pytest.raises(posenc.InvalidInputError, match="reveals"):
            run(model, ids[:, :1], cache, attention_mask=torch.ones(2, 41))
