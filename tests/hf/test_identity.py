"""The identity plan is bit-equal to the unpatched model in every use, and so is the model after detaching."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import posenc
from tests.hf import tiny

GREEDY = {"do_sample": False, "max_new_tokens": 10, "return_dict_in_generate": True, "output_logits": True}


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tiny.tokens(3, 40)
    mask = torch.ones_like(ids)
    for row, missing in enumerate((7, 13, 0)):
        where = slice(0, missing) if side == "left" else slice(40 - missing, 40)
        mask[row, where] = 0
    return ids * mask, mask


def generated(model: Any, **kwargs: Any) -> torch.Tensor:
    return torch.stack(model.generate(**{**GREEDY, **kwargs}).logits)


def turns(model: Any, cache: Any) -> torch.Tensor:
    ids = tiny.tokens(2, 45)
    parts = [ids[:, :20], ids[:, 20:21], ids[:, 21:22], ids[:, 22:]]
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


def repeated() -> torch.Tensor:
    return tiny.tokens(1, 15).repeat(1, 3)


USES: dict[str, Callable[[Any], torch.Tensor]] = {
    "forward": lambda m: m(tiny.tokens(2, 90)).logits,
    "position ids": lambda m: m(tiny.tokens(1, 20), position_ids=torch.arange(5, 25)[None]).logits,
    "embeddings": lambda m: m(inputs_embeds=m.get_input_embeddings()(tiny.tokens(1, 20))).logits,
    "left padding": lambda m: m(*padded("left")).logits,
    "right padding": lambda m: m(*padded("right")).logits,
    "packed": lambda m: (
        m(tiny.tokens(1, 20), position_ids=torch.cat((torch.arange(8), torch.arange(12)))[None], use_cache=False).logits
    ),
    "greedy": lambda m: generated(m, inputs=padded("left")[0], attention_mask=padded("left")[1]),
    "greedy, right padding": lambda m: generated(m, inputs=padded("right")[0], attention_mask=padded("right")[1]),
    "sampling": lambda m: (
        torch.manual_seed(5) and m.generate(tiny.tokens(2, 20), do_sample=True, max_new_tokens=10, top_k=0)
    ),
    "beams": lambda m: m.generate(tiny.tokens(2, 20), num_beams=3, do_sample=False, max_new_tokens=10),
    "prompt lookup": lambda m: generated(m, inputs=repeated(), prompt_lookup_num_tokens=4),
    "static cache": lambda m: generated(
        m, inputs=padded("left")[0], attention_mask=padded("left")[1], cache_implementation="static"
    ),
    "chunked prefill": lambda m: generated(m, inputs=tiny.tokens(2, 40), prefill_chunk_size=16),
    "turns": lambda m: turns(m, DynamicCache(config=m.config)),
    "turns, full cache": lambda m: turns(m, DynamicCache()),
    "turns, static": lambda m: turns(m, StaticCache(config=m.config, max_cache_len=64)),
    "tuples": lambda m: m(tiny.tokens(1, 20), return_dict=False)[0],
}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_identity_and_a_detached_model_are_bit_equal(family: str) -> None:
    model = tiny.make(family)
    with torch.no_grad():
        stock = {use: run(model) for use, run in USES.items()}
        with posenc.apply(model, "rope"):
            for use, run in USES.items():
                assert torch.equal(run(model), stock[use]), f"identity differs in: {use}"
        for use, run in USES.items():
            assert torch.equal(run(model), stock[use]), f"detached model differs in: {use}"


@pytest.mark.parametrize("kind", ["eager", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "mistral_sliding", "qwen3"])
def test_the_identity_is_bit_equal_under_other_kernels_and_dtypes(family: str, kind: str) -> None:
    model = tiny.make(family)
    if kind == "eager":
        model.set_attn_implementation("eager")
    else:
        model = model.to(torch.bfloat16)
    uses = [use for use in USES if use != "packed"]
    with torch.no_grad():
        stock = {use: USES[use](model) for use in uses}
        with posenc.apply(model, "rope"):
            for use in uses:
                assert torch.equal(USES[use](model), stock[use]), use
    assert model.config._attn_implementation == ("eager" if kind == "eager" else "sdpa")


def test_active_from_leaves_short_input_bit_equal() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(2, 60)
    with torch.no_grad():
        stock = model(ids).logits
        with posenc.apply(model, "rerope", window_size=8, active_from=60):
            assert torch.equal(model(ids).logits, stock)
        with posenc.apply(model, "rerope", window_size=8):
            assert not torch.equal(model(ids).logits, stock)


def test_yarn_equals_that_of_transformers() -> None:
    plain, declared = tiny.make("llama"), tiny.make("llama")
    config = copy.deepcopy(declared.config)
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": config.rope_parameters["rope_theta"],
        "factor": 4.0,
        "original_max_position_embeddings": tiny.WINDOW,
    }
    reference = type(declared)(config).eval()
    reference.load_state_dict(plain.state_dict())
    ids = tiny.tokens(2, 150)
    with torch.no_grad():
        expected = reference(ids).logits
        with posenc.apply(plain, "yarn", factor=4.0):
            assert torch.equal(plain(ids).logits, expected)
        with posenc.apply(reference, "rope"):  # a model that declares YaRN keeps it
            assert torch.equal(reference(ids).logits, expected)


def test_a_model_that_declares_dynamic_ntk_keeps_it() -> None:
    model = tiny.make("llama")
    config = copy.deepcopy(model.config)
    config.rope_parameters = {
        "rope_type": "dynamic",
        "rope_theta": config.rope_parameters["rope_theta"],
        "factor": 4.0,
    }
    dynamic = type(model)(config).eval()
    dynamic.load_state_dict(model.state_dict())
    with torch.no_grad():
        stock = [dynamic(tiny.tokens(1, n)).logits for n in (40, 150, 40)]
        with posenc.apply(dynamic, "rope"):
            for n, expected in zip((40, 150, 40), stock, strict=True):
                assert torch.equal(dynamic(tiny.tokens(1, n)).logits, expected)


@pytest.mark.parametrize("name", ["rerope", "self_extend", "string"])
def test_decoding_inside_the_untouched_window_is_bit_equal(name: str) -> None:
    model = tiny.make("llama")
    size = {"shift": 50} if name == "string" else {"window_size": 50}
    with torch.no_grad():
        stock = turns(model, DynamicCache(config=model.config))
        with posenc.apply(model, name, **size):
            assert torch.equal(turns(model, DynamicCache(config=model.config)), stock)
