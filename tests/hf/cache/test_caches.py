"""Caches that store keys and values in another form: quantized or offloaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import Cache, QuantizedLayer

import posenc
from tests.hf import tiny

STRATEGIES = [("rope", {}), ("lampe", tiny.LAMPE)]


class EightBitLayer(QuantizedLayer):
    """transformers' quantized cache layer, including its residual window, with the simplest quantizer."""

    def __init__(self) -> None:
        super().__init__(residual_length=4)

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        step = tensor.abs().amax() / 127
        return (tensor / step).round().to(torch.int8), step

    def _dequantize(self, q_tensor: tuple[Tensor, Tensor]) -> Tensor:
        return q_tensor[0] * q_tensor[1]


def held(layer: Any, what: str) -> Tensor:
    """Return the keys or values that a quantized layer returns before anything new is added."""
    stored: Tensor = layer._dequantize(getattr(layer, f"_quantized_{what}"))
    rest = getattr(layer, what)
    return torch.cat((stored, rest), 2) if rest.numel() else stored


@pytest.mark.parametrize(("name", "params"), STRATEGIES)
def test_a_quantized_cache_loses_only_what_its_quantizer_loses(name: str, params: dict[str, Any]) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, 100)
    with torch.no_grad(), posenc.apply(model, name, **params):
        cache, plain = Cache(layers=[EightBitLayer() for _ in model.model.layers]), DynamicCache(config=model.config)
        for filled in (cache, plain):
            model(ids[:, :90], past_key_values=filled)
        for i in range(90, 100):
            # the same step on an ordinary cache that holds the quantized raw keys
            twin = copy.deepcopy(plain)
            for layer, quantized in zip(twin.layers, cache.layers, strict=True):
                layer.keys, layer.values = held(quantized, "keys"), held(quantized, "values")
            got, exact, same = (
                model(ids[:, i : i + 1], past_key_values=filled).logits for filled in (cache, plain, twin)
            )
            assert (got - same).abs().max() < 1e-5
            assert 0 < (got - exact).abs().max() < 0.2 * exact.abs().max()


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this version of transformers has no fp8 cache"
)
@pytest.mark.parametrize(("name", "params"), STRATEGIES)
def test_generate_with_the_quantized_cache_of_transformers(name: str, params: dict[str, Any]) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(2, 80)
    with posenc.apply(model, name, **params):
        out = model.generate(
            ids,
            do_sample=False,
            max_new_tokens=6,
            cache_implementation="quantized",
            cache_config={"backend": "fp8"},
            return_dict_in_generate=True,
        )
        plain = DynamicCache(config=model.config)
        with torch.no_grad():
            model(out.sequences[:, :-1], past_key_values=plain)
    assert out.sequences.shape == (2, 86)
    quantized, exact = out.past_key_values.layers[0], plain.layers[0]  # raw keys, rounded once
    assert quantized._quantized_keys[0].dtype == torch.float8_e4m3fn
    assert (held(quantized, "keys") - exact.keys).abs().max() < 0.07 * exact.keys.abs().max()


class Stream:
    """Stands in for a CUDA stream without CUDA, where everything runs in order anyway."""

    def wait_stream(self, other: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass


@pytest.mark.parametrize(("name", "params"), STRATEGIES)
def test_an_offloaded_cache_changes_nothing(name: str, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers offloads through CUDA streams; with these replaced, layers are offloaded and fetched on the CPU
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    model, ids = tiny.make("llama"), tiny.tokens(2, 70)
    if torch.cuda.is_available():
        model, ids = model.cuda(), ids.cuda()
    moved: list[int] = []
    offload = cache_utils.CacheLayerMixin.offload
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "offload", lambda self: (moved.append(1), offload(self)))
    with posenc.apply(model, name, **params):
        expected = model.generate(ids, do_sample=False, max_new_tokens=8)
        assert not moved
        for kind in ("offloaded", "offloaded_static"):
            got = model.generate(
                ids, do_sample=False, max_new_tokens=8, cache_implementation=kind, disable_compile=True
            )
            assert torch.equal(got, expected)
            assert moved
            moved.clear()
