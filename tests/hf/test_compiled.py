"""Decoding on a static cache under torch.compile: one graph, no recompilation, the same numbers as eager decoding."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import Cache, StaticLayer

import posenc
from posenc.hf.cache.decode_tables import StaticDecodeTables
from posenc.hf.cache.state import CacheState
from posenc.planning.composed import ComposedStrategy
from posenc.planning.planner import KEPT_PLANS, Planner
from posenc.planning.schedule import Schedule
from posenc.testing import judge
from scripts import tiny_families
from tests.hf import tiny
from tests.hf.dense import dense_logits
from tests.hf.test_dense import PARAMS, PROMPT, REMAPS, TOLERANCE, without_replan
from tests.hf.tiny import LAMPE

STEPS = 12


class Compiled:
    """A model whose graphs are counted; a graph break is an error."""

    def __init__(self, model: Any, backend: Callable[..., Any] | str | None = None, fullgraph: bool = True) -> None:
        torch._dynamo.reset()
        self._graphs: list[Any] = []

        def count(graph: Any, _: Any) -> Any:  # a function, since generate copies bound methods with their object
            self._graphs.append(graph)
            return graph

        self.count = count
        self.call = torch.compile(model, backend=backend or count, fullgraph=fullgraph)

    @property
    def graphs(self) -> int:
        """The number of graphs compiled so far."""
        return len(self._graphs)


def decoded(
    model: Any, step: Any, ids: Tensor, prompt: int, room: int = 3, mask: Tensor | None = None, cache: Any = None
) -> Tensor:
    """Return logits of an eager prompt and of tokens decoded one by one on a static cache."""
    cache = cache or StaticCache(config=model.config, max_cache_len=ids.shape[1] + room)
    seen = None if mask is None else mask[:, :prompt]
    got = [model(ids[:, :prompt], attention_mask=seen, past_key_values=cache).logits]
    got += [
        step(ids[:, i : i + 1], attention_mask=mask, past_key_values=cache).logits for i in range(prompt, ids.shape[1])
    ]
    return torch.cat(got, 1)


# these cover segments, positions per frequency, query scales, dropped keys, factors on cos and sin, re-planning
@pytest.mark.parametrize("name", ["lampe", "dpe", "rerope+yarn", "streaming_llm", "dynamic"])
def test_one_graph_equals_the_dense_decoder(name: str) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(2, PROMPT + STEPS)
    strategy, *frequencies = (without_replan(part) for part in name.split("+"))
    strategy = ComposedStrategy(strategy, *frequencies) if frequencies else strategy
    compiled = Compiled(model)
    with torch.no_grad(), posenc.apply(model, strategy):
        got = decoded(model, compiled.call, ids, PROMPT)
    assert compiled.graphs == 1
    at = tiny.positions(model, strategy, PROMPT, PROMPT + STEPS)
    for row in range(2):
        assert (got[row] - dense_logits(model, ids[row], at)).abs().max() < TOLERANCE


def test_a_sliding_layer_compiles_as_often_as_stock() -> None:
    # transformers counts the tokens of a sliding cache in Python: one recompilation, and another when it is full
    model, strategy, ids = tiny.make("qwen2_sliding"), without_replan("rerope"), tiny.tokens(1, 40)
    compiled = Compiled(model)
    with torch.no_grad():
        decoded(model, compiled.call, ids, 15)
        expected = compiled.graphs
        compiled = Compiled(model)
        with posenc.apply(model, strategy):
            got = decoded(model, compiled.call, ids, 15)
    assert compiled.graphs == expected
    at = tiny.positions(model, strategy, 15, 40)
    assert (got[0] - dense_logits(model, ids[0], at)).abs().max() < TOLERANCE


def test_a_sliding_layer_is_exact_on_a_cache_of_all_tokens() -> None:
    model, strategy, ids = tiny.make("mistral_sliding"), without_replan("rerope"), tiny.tokens(1, PROMPT + 3)
    whole, compiled = Cache(layers=[StaticLayer(PROMPT + 9) for _ in model.model.layers]), Compiled(model)
    with torch.no_grad(), posenc.apply(model, strategy):
        got = decoded(model, compiled.call, ids, PROMPT, cache=whole)
    assert compiled.graphs == 1
    expected = dense_logits(model, ids[0], tiny.positions(model, strategy, PROMPT, PROMPT + 3))
    assert (got[0] - expected).abs().max() < TOLERANCE


# these cover softcap, sinks, another value width, step forwarding, layers without RoPE, linear attention
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "deepseek_v2", "stablelm", "smollm3", "qwen3_next"])
def test_families_that_deviate_from_llama_equal_the_judge(family: str) -> None:
    model = tiny_families.tiny_model(family, "eager" if family == "gemma2" else None)
    ids = tiny_families.tokens(1, 44)
    strategy = posenc.strategy("rerope", window=tiny_families.WINDOW, window_size=6, replan="never")
    expected = judge.dense_logits(model, ids, strategy.plan(40, 44).relative_positions())
    compiled = Compiled(model)
    with torch.no_grad(), posenc.apply(model, strategy):
        got = decoded(model, compiled.call, ids, 40)[0]
    assert compiled.graphs == (2 if family in ("gemma2", "gpt_oss") else 1)
    assert (got - expected).abs().max() < 5e-5 * expected.abs().max()


@pytest.mark.parametrize(("family", "implementation"), [("llama", "eager"), ("qwen2_sliding", "sdpa")])
def test_identity_is_bit_equal_to_stock_compiled_the_same_way(family: str, implementation: str) -> None:
    model, ids = tiny.make(family), tiny.tokens(2, 44)
    model.set_attn_implementation(implementation)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad():
        stock = decoded(model, Compiled(model).call, ids, 36, mask=mask)
        with posenc.apply(model, "lampe", **LAMPE, active_from=40):
            assert torch.equal(decoded(model, Compiled(model).call, ids, 36, mask=mask), stock)


def test_rows_with_every_kind_of_padding_equal_the_dense_decoder() -> None:
    model, strategy, ids = tiny.make("llama"), without_replan("lampe"), tiny.tokens(3, PROMPT + STEPS)
    mask = torch.ones_like(ids)
    mask[0, : PROMPT - 11], mask[1, 70:PROMPT] = 0, 0  # padding on the left, on the right, none
    compiled = Compiled(model)
    with torch.no_grad(), posenc.apply(model, strategy):
        got = decoded(model, compiled.call, ids, PROMPT, mask=mask)
    assert compiled.graphs == 1
    for row, length in enumerate((11, 70, PROMPT)):
        real = mask[row].bool()
        expected = dense_logits(model, ids[row, real], tiny.positions(model, strategy, length, length + STEPS))
        assert (got[row, real] - expected).abs().max() < TOLERANCE, f"row {row}"


@pytest.mark.parametrize(("name", "params"), [("lampe", {**LAMPE, "replan": 8}), ("dynamic", {"factor": 4})])
def test_generate_on_a_static_cache_is_the_same_with_and_without_compilation(name: str, params: dict[str, Any]) -> None:
    # rows of 11, 50 and 60 tokens grow to 31, 70 and 80, across the window of 64 and several plans
    model, ids = tiny.make("llama"), tiny.tokens(3, 60)
    mask = torch.ones_like(ids)
    mask[0, :49], mask[1, :10] = 0, 0
    compiled = Compiled(model)
    config = CompileConfig(fullgraph=True, backend=compiled.count, mode=None)
    config._compile_all_devices = True
    same: dict[str, Any] = {"input_ids": ids * mask, "attention_mask": mask, "do_sample": False, "max_new_tokens": 20}
    same |= {"return_dict_in_generate": True, "output_logits": True}
    with posenc.apply(model, name, **params):
        dynamic = model.generate(**same)
        static = model.generate(**same, cache_implementation="static")
        assert compiled.graphs == 0
        traced = model.generate(**same, cache_implementation="static", compile_config=config)
        assert compiled.graphs == 1
        again = model.generate(**same, cache_implementation="static", compile_config=config)
    assert compiled.graphs == 1
    for out in (static, traced, again):
        assert torch.equal(out.sequences, dynamic.sequences)
        assert (torch.stack(out.logits) - torch.stack(dynamic.logits)).abs().max() < 1e-4


def test_a_turn_after_compiled_steps_plans_with_the_new_length() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    outs, records = [], []
    with torch.no_grad(), posenc.apply(model, "lampe", **LAMPE):
        step = Compiled(model).call
        for decode in (model, step):
            cache = StaticCache(config=model.config, max_cache_len=120)
            model(ids[:, :50], attention_mask=mask[:, :50], past_key_values=cache)
            for i in range(50, 80):  # crosses the window, which causes a re-plan
                decode(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
            twin = copy.deepcopy(cache)
            assert next(iter(CacheState.of(twin).tables.kind_of)) is model.model.layers[0].self_attn
            aside = decode(ids[:, 80:81], attention_mask=mask[:, :81], past_key_values=twin).logits
            turn = model(ids[:, 80:100], attention_mask=mask[:, :100], past_key_values=cache).logits
            after = decode(ids[:, 100:101], attention_mask=mask[:, :101], past_key_values=cache).logits
            last = model(ids[:, 101:102], attention_mask=mask[:, :102], past_key_values=cache).logits
            end = decode(ids[:, 102:103], attention_mask=mask[:, :103], past_key_values=cache).logits
            model(ids[:, 103:104], attention_mask=mask[:, :104], past_key_values=cache)
            outs.append(torch.cat((aside, turn, after, last, end), 1))
            records.append(CacheState.of(cache).record)
    assert (outs[0] - outs[1]).abs().max() < 1e-5
    assert records[0].rows == records[1].rows
    assert torch.equal(records[0].position_ids_BT, records[1].position_ids_BT)
    assert len(records[0].rows[1].schedule.entries) == 3  # prompt, re-plan, turn


def test_a_compiled_model_follows_detach_and_another_strategy() -> None:
    model, ids = tiny.shallow("llama"), tiny.tokens(1, PROMPT + 3)
    step = Compiled(model).call
    with torch.no_grad():
        stock = decoded(model, step, ids, PROMPT)
        for name, params in (("lampe", LAMPE), ("rerope", {"window_size": 8})):
            with posenc.apply(model, name, **params):
                eager = decoded(model, model, ids, PROMPT)
                assert (decoded(model, step, ids, PROMPT) - eager).abs().max() < 1e-5
            assert torch.equal(decoded(model, step, ids, PROMPT), stock)


@pytest.mark.parametrize("wrong", ["padding", "position", "mask", "square mask", "detached"])
def test_a_token_that_does_not_continue_the_cache_is_an_error(wrong: str) -> None:
    model, ids = tiny.shallow("llama"), tiny.tokens(2, 95)
    mask = torch.ones(2, 91)
    inputs: dict[str, Any] = {"input_ids": ids[:, 90:91], "attention_mask": mask}
    step = Compiled(model).call
    with torch.no_grad():
        with posenc.apply(model, "lampe", **LAMPE):
            cache = StaticCache(config=model.config, max_cache_len=100)
            model(ids[:, :90], past_key_values=cache)
        if wrong == "detached":
            model(ids[:, 90:91], past_key_values=cache)
        elif wrong == "position":
            inputs["position_ids"] = torch.tensor([[3], [90]])
        elif wrong == "square mask":
            inputs["attention_mask"] = (torch.arange(100) <= 90).repeat(2, 1, 1, 1)
            inputs["attention_mask"][0, 0, 0, 4] = False
        else:
            mask[0, 90 if wrong == "padding" else 4] = 0
        with posenc.apply(model, "lampe", **LAMPE), pytest.raises(RuntimeError, match="does not continue"):
            step(**inputs, past_key_values=cache)


@pytest.mark.parametrize(
    ("family", "params", "reason"),
    [("mistral_sliding", LAMPE, "all its layers slide"), ("llama", {**LAMPE, "replan": 1}, "re-plan")],
)
def test_a_cache_without_precomputed_tables_warns_and_stays_exact(
    family: str, params: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, ids = tiny.shallow(family), tiny.tokens(1, 73)
    compiled = Compiled(model, fullgraph=False)
    with torch.no_grad(), posenc.apply(model, "lampe", **params), caplog.at_level(logging.WARNING, "posenc"):
        expected = decoded(model, model, ids, 70, room=80)
        assert not caplog.records
        got = decoded(model, compiled.call, ids, 70, room=80)
    assert torch.equal(got, expected)
    (record,) = caplog.records
    assert reason in record.message


def test_the_precomputed_schedule_equals_decoding_one_by_one() -> None:
    for name, params in PARAMS.items():
        for rule in ({"replan": "never"}, {"replan": 9}, {}) if name in REMAPS else ({},):
            strategy = posenc.strategy(name, window=tiny.WINDOW, **{**params, **rule})
            planner = Planner(strategy)
            for length in (20, 63, 90):
                start = planner.extend(Schedule(), 0, length)
                expected = planner.extend(start, length, 150, candidates=150 - length)
                future = planner.future(start, length, 150)
                assert future == expected or (future is None and len(expected.entries) > KEPT_PLANS)


def test_a_step_compiled_with_inductor_is_exact() -> None:
    model, strategy, ids = tiny.shallow("llama"), without_replan("lampe"), tiny.tokens(1, PROMPT + 3)
    with torch.no_grad(), posenc.apply(model, strategy):
        got = decoded(model, Compiled(model, "inductor").call, ids, PROMPT)
    expected = dense_logits(model, ids[0], tiny.positions(model, strategy, PROMPT, PROMPT + 3))
    assert (got[0] - expected).abs().max() < TOLERANCE


def test_only_static_caches_have_precomputed_tables() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 30)
    with torch.no_grad(), posenc.apply(model, "lampe", **LAMPE):
        dynamic, static = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)
        for cache in (dynamic, static):
            model(ids, past_key_values=cache)
    assert CacheState.of(dynamic).tables is None
    tables = CacheState.of(static).tables
    assert isinstance(tables, StaticDecodeTables)
    assert int(tables.count) == 30
