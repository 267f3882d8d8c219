"""``generate_batch`` of a patched model gives each request the same tokens as ``generate`` alone."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.continuous_batching.requests import RequestState
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import posenc
from tests.hf import tiny
from tests.hf.batches import batched, greedy, reused_prefixes
from tests.hf.tiny import LAMPE

NEW = 16
LENGTHS = (5, 90, 33, 70, 12, 120, 64)


def prompts() -> list[list[int]]:
    return [tiny.tokens(length, seed=length).tolist() for length in LENGTHS]


def settings(**changes: Any) -> ContinuousBatchingConfig:
    """Batches of at most four requests and 48 tokens: longer prompts are prefilled in chunks, and requests queue."""
    sizes = {"page_size": 8, "num_blocks": 80, "max_batch_tokens": 48, "max_requests_per_batch": 4}
    return ContinuousBatchingConfig(**{**sizes, **changes})


def together(model: Any, inputs: list[list[int]], **changes: Any) -> list[list[int]]:
    return batched(model, inputs, NEW, settings(**changes))


def alone(model: Any, inputs: list[list[int]]) -> list[list[int]]:
    rows = (torch.tensor([tokens]) for tokens in inputs)
    return [model.generate(row, do_sample=False, max_new_tokens=NEW)[0, row.shape[1] :].tolist() for row in rows]


@pytest.mark.parametrize(
    ("family", "name", "params"),
    [
        ("llama", "rope", {}),
        ("llama", "lampe", LAMPE),
        ("llama", "rerope", {"window_size": 12}),
        ("llama", "self_extend", {"group": 4, "window_size": 16}),
        ("llama", "streaming_llm", {"window_size": 20, "frequencies": {"name": "dynamic", "factor": 4}}),
        ("qwen2_sliding", "rope", {}),
        ("mistral_sliding", "lampe", LAMPE),
    ],
)
def test_every_request_gets_the_same_tokens_as_alone(family: str, name: str, params: dict[str, Any]) -> None:
    model, inputs = tiny.make(family), prompts()
    with posenc.apply(model, name, **params):
        assert together(model, inputs) == alone(model, inputs)


def test_preempted_requests_get_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.make("llama"), prompts()
    resets: list[str] = []
    begin = RequestState.create_equivalent_initial_request

    def noted(state: RequestState) -> RequestState:
        resets.append(state.request_id)
        return begin(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noted)
    with posenc.apply(model, "lampe", replan=10, **LAMPE):
        assert together(model, inputs, num_blocks=22, cpu_offload_space=0.0) == alone(model, inputs)
    assert resets


def test_a_model_with_eager_attention_is_exact() -> None:
    model, inputs = tiny.make("llama"), prompts()[:3]
    model.set_attn_implementation("eager")
    with posenc.apply(model, "lampe", active_from=64, **LAMPE):  # short requests use stock attention
        assert together(model, inputs) == alone(model, inputs)
    assert model.config._attn_implementation == "eager"


def test_prefixes_are_shared_unless_keys_depend_on_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny.make("llama")
    inputs = [tiny.tokens(80, seed=1).tolist() + tiny.tokens(extra, seed=extra).tolist() for extra in (1, 9, 30, 14)]
    with reused_prefixes() as reused, caplog.at_level(logging.INFO, logger="posenc"):
        with posenc.apply(model, "rerope", window_size=12):
            assert together(model, inputs, max_requests_per_batch=1) == alone(model, inputs)
        assert max(reused) >= 72
        assert "block sharing is off" not in caplog.text
        reused.clear()
        with posenc.apply(model, "lampe", **LAMPE):
            assert together(model, inputs, max_requests_per_batch=1) == alone(model, inputs)
        assert not any(reused)
        assert "block sharing is off" in caplog.text


def test_unpatched_models_and_removal_are_unaffected() -> None:
    inputs = prompts()[:3]
    model, other = tiny.make("llama"), tiny.make("llama", seed=5)
    before, expected = together(model, inputs), together(other, inputs)
    functions = dict(ALL_ATTENTION_FUNCTIONS.items())
    with posenc.apply(model, "rerope", window_size=12):
        assert together(other, inputs) == expected
        remapped = together(model, inputs)
        assert {name: function for name, function in ALL_ATTENTION_FUNCTIONS.items() if name in functions} == functions
        assert together(copy.deepcopy(model), inputs) == remapped
    assert remapped != before
    assert together(model, inputs) == before
    assert "init_continuous_batching" not in vars(model)


def test_managers_do_not_outlive_their_handle() -> None:
    model, ids = tiny.make("llama"), prompts()[:2]
    model.generate_batch(ids, greedy(NEW), settings(), persistent_manager=True)
    with posenc.apply(model, "lampe", **LAMPE):
        with pytest.raises(posenc.CacheMismatchError, match="destroy_cached"):
            model.generate_batch(ids, greedy(NEW), settings())
        model.destroy_cached_continuous_batching_manager()
        for _ in range(2):
            outputs = model.generate_batch(ids, greedy(NEW), settings(), persistent_manager=True)
        assert [output.generated_tokens for output in outputs.values()] == alone(model, ids)
    assert not hasattr(model, "_cached_continuous_batching_manager")

    early = model.init_continuous_batching(greedy(NEW), settings())
    with posenc.apply(model, "lampe", **LAMPE) as handle:
        early.start()
        early.add_request(ids[0], request_id="early")
        assert "made before posenc" in early.get_result(timeout=20).error
        early.stop()
        late = model.init_continuous_batching(greedy(10**6), settings())
        late.start()
        late.add_request(ids[0], request_id="late")
        handle.remove()
        assert not late.is_running()


def test_options_that_cannot_be_exact_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model = LlamaForCausalLM(LlamaConfig(**tiny.SHAPE, rope_parameters=scaled)).eval()
    with posenc.apply(model, "rope"), pytest.raises(posenc.UnsupportedModelError, match=r"longest request .*dynamic"):
        together(model, prompts())
    model = tiny.make("llama")
    with posenc.apply(model, "lampe", **LAMPE):
        for changes in ({"use_async_batching": True}, {"varlen_compile_config": CompileConfig()}):
            with pytest.raises(posenc.BackendError, match="not available while posenc is applied"):
                together(model, prompts(), **changes)
        monkeypatch.setattr(PagedAttentionCache, "update", lambda self, read_index, write_index: None)
        with pytest.raises(posenc.UnsupportedModelError, match=r"transformers 5\.23"):
            together(model, prompts())
