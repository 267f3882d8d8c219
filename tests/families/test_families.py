"""One family per deviation from Llama: bit-equal identity, a remap equal to the dense judge, bit-equal detaching."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from packaging.version import Version

import posenc
from posenc.adapter import EVERY_FAMILY
from posenc.hf.apply import find_adapter
from posenc.testing.judge import dense_logits
from posenc.testing.models import decoded, relative_error
from scripts.family_measure import PROMPT, STEPS, TOLERANCE, farthest, used
from scripts.tiny_families import WINDOW, tiny_model, tokens

# by family: the layers as the probe must find them (one text per kind of layer)
DEVIATIONS: dict[str, tuple[str, ...]] = {
    "llama": ("4 x half, channels 0..15",),
    "mistral": ("4 x half, channels 0..15, window 16",),
    "qwen2": ("4 x half, channels 0..7",),
    "qwen3": ("4 x half, channels 0..15",),
    "gpt_neox": ("4 x half, channels 0..1",),
    "glm4": ("4 x interleaved, channels 0..7",),
    "cohere2": ("2 x interleaved, channels 0..7, window 16", "2 x no rotary positions"),
    "smollm3": ("3 x half, channels 0..7", "1 x no rotary positions"),
    "gemma3_text": (
        "2 x half, channels 0..15, frequencies of sliding_attention, window 16",
        "2 x half, channels 0..15, frequencies of full_attention",
    ),
    "deepseek_v2": ("4 x interleaved, channels 12..19",),
    "deepseek_v3": ("4 x half, channels 12..19",),
    "gpt_oss": ("2 x half, channels 0..15, window 16", "2 x half, channels 0..15"),
    "gemma2": ("2 x half, channels 0..15, window 16", "2 x half, channels 0..15"),
    "gemma3n_text": (
        "2 x half, channels 0..15, frequencies of sliding_attention, window 16",
        "2 x half, channels 0..15, frequencies of full_attention",
    ),
    "stablelm": ("4 x half, channels 0..1",),
    "moshi": ("1 x half, channels 0..15",) * 4,
    "qwen3_next": ("2 x half, channels 0..3",),  # and two layers of linear attention
    "beam": ("2 x half, channels 0..15, frequencies of sliding_attention, window 16", "2 x no rotary positions"),
    "olmo2": ("4 x half, channels 0..7",),
    "zamba2": ("2 x half, channels 0..15",),  # layers share one attention module, but have their own keys
    "hrm_text": ("8 x half, channels 0..15",),  # the same
    "modernbert-decoder": (
        "2 x half, channels 0..7, frequencies of full_attention",
        "2 x half, channels 0..7, frequencies of sliding_attention, window 16",
    ),
}
EAGER = ("gemma2",)
SINCE = {"moshi": "5.23", "beam": "5.23"}


BUILDERS = {name: partial(tiny_model, name, "eager" if name in EAGER else None) for name in DEVIATIONS}


@pytest.mark.parametrize("family", DEVIATIONS)
class TestFamilies(posenc.testing.AdapterContract):
    @pytest.fixture(autouse=True)
    def _choose(self, family: str) -> None:
        since = SINCE.get(family, "0")
        if Version(transformers.__version__) < Version(since):
            pytest.skip(f"served from transformers {since} on")
        self.model, self.layers = BUILDERS[family], DEVIATIONS[family]
        self.adapter = find_adapter(self._built)


def test_every_family_that_an_adapter_names_is_measured() -> None:
    named = {model_type for info in posenc.adapters().values() for model_type in info.adapter.model_types}
    assert named <= {*DEVIATIONS, EVERY_FAMILY}


@pytest.mark.parametrize("name", ["olmo2", "cohere2", "ernie4_5"])
def test_the_identity_is_bit_equal_in_bfloat16(name: str) -> None:
    model = tiny_model(name).to(torch.bfloat16)
    stock = used(model)
    with posenc.apply(model, "rope", window=WINDOW):
        assert farthest(used(model), stock) == 0


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "gemma2"])
def test_gradients_are_equal_with_and_without_checkpointing(name: str) -> None:
    grads = []
    for checkpointing in (False, True):
        model, ids = tiny_model(name, "eager" if name in EAGER else None).train(), tokens(2, 30)
        model.config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable()
        with posenc.apply(model, "rerope", window=WINDOW, window_size=6):
            model(ids, labels=ids).loss.backward()
        grads.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert bool((grads[0] != 0).any())
    assert torch.allclose(grads[0], grads[1], atol=1e-5)


def test_frequencies_are_those_of_each_layer_type() -> None:
    theta = {"sliding_attention": 100.0, "full_attention": 1e6}
    parameters = {kind: {"rope_type": "default", "rope_theta": value} for kind, value in theta.items()}
    parameters["full_attention"] |= {"rope_type": "linear", "factor": 4.0}
    model = tiny_model("olmo3", rope_parameters=parameters)
    ids = tokens(1, PROMPT + STEPS)
    strategy = posenc.strategy("rerope", window=WINDOW, window_size=6, replan="never")
    expected = dense_logits(model, ids, strategy.plan(PROMPT, PROMPT + STEPS).relative_positions())
    stock = used(model)
    with torch.no_grad(), posenc.apply(model, strategy):
        assert relative_error(decoded(model, ids, PROMPT)[0], expected) < TOLERANCE
    with posenc.apply(model, "rope", window=WINDOW):
        assert farthest(used(model), stock) == 0


def test_checkpointing_is_exact_or_refused_if_layers_drop_keyword_arguments() -> None:
    """transformers 5.17 runs such a layer again with its hooks, 5.23 without them: exact gradients or an error."""
    model, ids = tiny_model("stablelm").train(), tokens(2, 30)
    model.config.use_cache = False
    weight = model.model.layers[0].self_attn.k_proj.weight
    with posenc.apply(model, "rerope", window=WINDOW, window_size=6):
        (plain,) = torch.autograd.grad(model(ids, labels=ids).loss, weight)
        model.gradient_checkpointing_enable()
        if Version(transformers.__version__) >= Version("5.23"):
            with pytest.raises(posenc.UnsupportedModelError, match="gradient checkpointing"):
                torch.autograd.grad(model(ids, labels=ids).loss, weight)
        else:
            (again,) = torch.autograd.grad(model(ids, labels=ids).loss, weight)
            assert torch.allclose(plain, again, atol=1e-5)


FOLLOWING_LENGTH = {
    "llama": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "phi3": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 20,
    },
}


@pytest.mark.parametrize("name", FOLLOWING_LENGTH)
def test_frequencies_by_length_are_exact(name: str) -> None:
    longest = 80 if name == "phi3" else 20
    model = tiny_model(name, rope_parameters=FOLLOWING_LENGTH[name], max_position_embeddings=longest)
    with torch.no_grad():
        for length in (15, 45):
            ids = tokens(2, length)
            stock = model(ids, use_cache=False).logits
            with posenc.apply(model, "rope", window=20):
                assert torch.equal(model(ids, use_cache=False).logits, stock)
