"""Windows and frequencies of real configurations, read from their config.json and from the objects of transformers."""

from __future__ import annotations

import importlib
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

import posenc
from posenc.adapter import ArchitectureAdapter
from posenc.checkpoint import _warn_once

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN4 = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA = {"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
MISTRAL = {**LLAMA, "model_type": "mistral", "max_position_embeddings": 32768, "intermediate_size": 14336}
QWEN25 = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1e6,
    "sliding_window": 131072,
    "use_sliding_window": False,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}
PHI3 = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rope_theta": 1e4,
    "pad_token_id": 0,
}
GEMMA3 = {
    "model_type": "gemma3_text",
    "hidden_size": 2560,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "num_hidden_layers": 34,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "sliding_window": 1024,
    "query_pre_attn_scalar": 256,
}
DEEPSEEK = {
    "num_attention_heads": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "max_position_embeddings": 163840,
    "rope_theta": 1e4,
}
DEEPSEEK_YARN = {
    "type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}

REAL: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 2 7B": ({**LLAMA, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rope_theta": 1e4}, 4096),
    "Llama 3 8B": ({**LLAMA, "max_position_embeddings": 8192, "rope_theta": 5e5}, 8192),
    "Llama 3.1 8B": (
        {
            **LLAMA,
            "max_position_embeddings": 131072,
            "rope_theta": 5e5,
            "rope_scaling": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192},
        },
        131072,
    ),
    "Llama 3.2 1B": (
        {
            **LLAMA,
            "hidden_size": 2048,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_theta": 5e5,
            "rope_scaling": {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
        },
        131072,
    ),
    "Mistral 7B 0.1": ({**MISTRAL, "rope_theta": 1e4, "sliding_window": 4096}, 32768),
    "Mistral 7B 0.2": ({**MISTRAL, "rope_theta": 1e6, "sliding_window": None}, 32768),
    "Mistral 7B 0.3": ({**MISTRAL, "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768}, 32768),
    "Qwen 2.5 7B": ({**QWEN25, "max_position_embeddings": 32768}, 32768),
    "Qwen 2.5 7B with YaRN": ({**QWEN25, "max_position_embeddings": 32768, "rope_scaling": YARN4}, 32768),
    "Qwen 2.5 7B with YaRN, both raised": (
        {**QWEN25, "max_position_embeddings": 131072, "rope_scaling": YARN4},
        32768,
    ),
    "Qwen 2.5 7B 1M": (
        {
            **QWEN25,
            "max_position_embeddings": 1010000,
            "rope_theta": 1e7,
            "dual_chunk_attention_config": {
                "chunk_size": 262144,
                "local_size": 8192,
                "original_max_position_embeddings": 262144,
            },
        },
        262144,
    ),
    "Qwen 3 8B": (QWEN3, 40960),
    "Qwen 3 8B with YaRN": ({**QWEN3, "rope_scaling": YARN4}, 32768),
    "Phi 3 mini 4k": ({**PHI3, "max_position_embeddings": 4096, "sliding_window": 2047}, 4096),
    "Phi 3 mini 128k": (
        {
            **PHI3,
            "max_position_embeddings": 131072,
            "sliding_window": 262144,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + c / 48 for c in range(48)],
                "long_factor": [1.0 + c for c in range(48)],
            },
        },
        131072,
    ),
    "Gemma 2 9B": (
        {
            "model_type": "gemma2",
            "hidden_size": 3584,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "rope_theta": 1e4,
            "sliding_window": 4096,
        },
        8192,
    ),
    "Gemma 3 1B": ({**GEMMA3, "hidden_size": 1152, "max_position_embeddings": 32768}, 32768),
    "Gemma 3 4B": (
        {**GEMMA3, "max_position_embeddings": 131072, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        131072,
    ),
    "gpt-oss 20B": (
        {
            "model_type": "gpt_oss",
            "hidden_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rope_theta": 150000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        131072,
    ),
    "DeepSeek V2": (
        {
            **DEEPSEEK,
            "model_type": "deepseek_v2",
            "hidden_size": 5120,
            "rope_scaling": {**DEEPSEEK_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
        163840,
    ),
    "DeepSeek V3": (
        {
            **DEEPSEEK,
            "model_type": "deepseek_v3",
            "hidden_size": 7168,
            "rope_scaling": {**DEEPSEEK_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
        163840,
    ),
}
MODULES = {
    "llama": "LlamaRotaryEmbedding",
    "mistral": "MistralRotaryEmbedding",
    "qwen2": "Qwen2RotaryEmbedding",
    "qwen3": "Qwen3RotaryEmbedding",
    "phi3": "Phi3RotaryEmbedding",
    "gemma2": "Gemma2RotaryEmbedding",
    "gemma3": "Gemma3RotaryEmbedding",
    "gpt_oss": "GptOssRotaryEmbedding",
    "deepseek_v2": "DeepseekV2RotaryEmbedding",
    "deepseek_v3": "DeepseekV3RotaryEmbedding",
}


def of_transformers(data: dict[str, Any]) -> Any:
    return CONFIG_MAPPING[data["model_type"]](**json.loads(json.dumps(data)))


def forms(data: dict[str, Any]) -> dict[str, Any]:
    """A configuration as a dict, as attributes, as transformers reads it, and as transformers writes it again."""
    config = of_transformers(data)
    return {"dict": data, "attributes": SimpleNamespace(**data), "transformers": config, "written": config.to_dict()}


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    _warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "posenc")
    return caplog


@pytest.mark.parametrize("name", REAL)
def test_the_windows_of_real_checkpoints_are_read(name: str, warnings: pytest.LogCaptureFixture) -> None:
    data, window = REAL[name]
    assert {form: posenc.window_of(config) for form, config in forms(data).items()} == dict.fromkeys(
        ("dict", "attributes", "transformers", "written"), window
    )
    assert not [record for record in warnings.records if record.name == "posenc"]


@pytest.mark.parametrize("name", REAL)
def test_frequencies_of_real_checkpoints_are_those_of_their_modules(name: str) -> None:
    data, _ = REAL[name]
    family = data["model_type"].removesuffix("_text")
    module = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), MODULES[family])(
        of_transformers(data)
    )
    for layer_type in ("full_attention", "sliding_attention") if family == "gemma3" else (None,):
        prefix = "" if layer_type is None else f"{layer_type}_"
        for form, config in forms(data).items():
            rotary = posenc.rotary_of(config, layer_type)
            assert torch.equal(rotary.inv_freq, getattr(module, f"{prefix}inv_freq")), form
            assert rotary.attention_scaling == getattr(module, f"{prefix}attention_scaling", 1.0), form
            kind = module.rope_type
            assert rotary.scaling == (kind if layer_type is None else kind[layer_type]), form


def test_a_multimodal_model_has_the_window_of_its_text_model() -> None:
    inside, window = REAL["Gemma 3 4B"]
    assert posenc.window_of({"model_type": "gemma3", "text_config": inside}) == window
    assert posenc.window_of(SimpleNamespace(text_config=SimpleNamespace(**inside))) == window
    whole = CONFIG_MAPPING["gemma3"](text_config=inside)
    assert posenc.window_of(whole) == window
    assert posenc.rotary_of(whole, "full_attention").scaling == "linear"


def test_two_ambiguous_windows_are_reported_once(warnings: pytest.LogCaptureFixture) -> None:
    data = {**LLAMA, "max_position_embeddings": 131072, "rope_theta": 1e4, "rope_scaling": YARN4}
    for config in forms(data).values():
        assert posenc.window_of(config) == 32768
    said = [record.getMessage() for record in warnings.records if "declares two windows" in record.getMessage()]
    assert len(said) == 2  # one for a LlamaConfig, one for "the configuration"
    for message in said:
        assert "32768" in message
        assert "window=131072" in message


def test_a_configuration_without_a_usable_window_is_refused() -> None:
    for config, why in (
        ({}, "no max_position_embeddings: pass window="),
        ({"max_position_embeddings": 0}, "no max_position_embeddings"),
        ({"max_position_embeddings": "4096"}, "max_position_embeddings='4096'"),
        ({"max_position_embeddings": 2048.5}, "max_position_embeddings=2048.5"),
        (
            {"max_position_embeddings": 9, "rope_scaling": {"type": "su", "original_max_position_embeddings": 3}},
            "'su' .* longrope had in the first Phi-3",
        ),
        ({"max_position_embeddings": 9, "rope_parameters": {"rope_type": "wavy"}}, "'wavy'.*know default, linear"),
        ({"max_position_embeddings": 9, "dual_chunk_attention_config": {"x": 1}}, "no dual_chunk_attention_config"),
    ):
        for form in (config, SimpleNamespace(**config)):
            with pytest.raises(posenc.UnsupportedModelError, match=why):
                posenc.window_of(form)


def test_a_configuration_without_usable_frequencies_is_refused() -> None:
    gemma, _ = REAL["Gemma 3 4B"]
    llama, _ = REAL["Llama 3.1 8B"]
    for config, layer_type, why in (
        (gemma, None, "Pass layer_type, one of full_attention, sliding_attention"),
        (gemma, "linear_attention", "Pass layer_type"),
        ({**llama, "rope_theta": None}, None, "no rope_theta"),
        ({**llama, "rope_scaling": {"type": "su"}}, None, "first Phi-3"),
        ({**llama, "rope_scaling": {"rope_type": "llama3"}}, None, "llama3 scaling lacks .*factor"),
        ({**llama, "hidden_size": None}, None, "neither head_dim"),
        ({**llama, "head_dim": 5}, None, "5 rotated channels of 5"),
    ):
        with pytest.raises(posenc.UnsupportedModelError, match=why):
            posenc.rotary_of(config, layer_type)
    assert posenc.rotary_of(llama, "full_attention").scaling == "llama3"  # the same in every layer


def test_an_adapter_uses_this_window() -> None:
    for name in ("Llama 3.1 8B", "Qwen 3 8B with YaRN"):
        data, window = REAL[name]
        model = torch.nn.Module()
        model.config = of_transformers(data)  # type: ignore[assignment]
        assert ArchitectureAdapter("a", "b", ("llama",)).window(model) == window


def test_the_first_phi_3_configurations_are_read_only_after_transformers_renames_their_rope_type() -> None:
    data, window = REAL["Phi 3 mini 128k"]
    old = {**data, "rope_scaling": {**data["rope_scaling"], "type": "su", "original_max_position_embeddings": 4096}}
    assert posenc.window_of(of_transformers(old)) == window
    rotary, expected = posenc.rotary_of(of_transformers(old)), posenc.rotary_of(data)
    assert torch.equal(rotary.inv_freq, expected.inv_freq)
    assert (rotary.attention_scaling, rotary.scaling) == (expected.attention_scaling, "longrope")
    for ask in (posenc.window_of, posenc.rotary_of):
        with pytest.raises(posenc.UnsupportedModelError, match=r"'su'.*write 'longrope'"):
            ask(old)
