"""Copies of a good adapter with one mistake each: the contract names every mistake."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import posenc
from posenc.adapter import RotarySource
from posenc.rope import Rotary
from posenc.testing import AdapterContract, ContractViolation
from scripts.tiny_families import WINDOW, tiny_model

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 32,
}
long_phi = partial(
    tiny_model, "phi3", rope_parameters=LONGROPE, max_position_embeddings=80, original_max_position_embeddings=32
)


class Good(posenc.ArchitectureAdapter):
    """The adapter from which every mutant is made."""


def good(kind: type[posenc.ArchitectureAdapter] = Good, **changes: Any) -> posenc.ArchitectureAdapter:
    return replace(kind("good", "for the tests", ("phi3", "llama"), style="half"), **changes)


class WrongFrequencies(Good):
    def rotary(self, decoder: nn.Module, source: RotarySource, position_ids_BL: Tensor) -> Rotary:
        base = super().rotary(decoder, source, position_ids_BL)
        return base.with_frequencies(base.inv_freq * 0.9, base.attention_scaling)


class ScalingForgotten(Good):
    def rotary(self, decoder: nn.Module, source: RotarySource, position_ids_BL: Tensor) -> Rotary:
        base = super().rotary(decoder, source, position_ids_BL)
        return base.with_frequencies(base.inv_freq, 1.0)


class FrequenciesOfAShortText(Good):
    def rotary(self, decoder: nn.Module, source: RotarySource, position_ids_BL: Tensor) -> Rotary:
        return super().rotary(decoder, source, torch.zeros(1, 1, dtype=torch.long))


class WritesIntoTheModel(Good):
    def rotary(self, decoder: nn.Module, source: RotarySource, position_ids_BL: Tensor) -> Rotary:
        base = super().rotary(decoder, source, position_ids_BL)
        embeddings: Any = decoder.get_input_embeddings()  # type: ignore[operator]
        embeddings.weight.data[-1] += 1  # of a token that occurs in no text
        return base


class LeavesAHook(Good):
    def rotary_modules(self, decoder: nn.Module) -> dict[str, nn.Module]:
        decoder.register_forward_hook(lambda *_: None)
        return super().rotary_modules(decoder)


class NoRotaryModule(Good):
    def rotary_modules(self, decoder: nn.Module) -> dict[str, nn.Module]:
        return {}


class NamesItWrong(Good):
    def rotary_modules(self, decoder: nn.Module) -> dict[str, nn.Module]:
        return {f"model.{name}": module for name, module in super().rotary_modules(decoder).items()}


class AnotherDecoder(Good):
    def decoder(self, model: nn.Module) -> nn.Module:
        return tiny_model("phi3").model  # type: ignore[no-any-return]


class StartOfTheScaling(Good):
    def window(self, model: nn.Module) -> int:
        config: Any = model.config
        return int(config.original_max_position_embeddings)


MUTANTS: dict[str, tuple[posenc.ArchitectureAdapter, Callable[[], Any], str, str]] = {
    "style": (good(style="interleaved"), long_phi, "the_probe_finds", r"apply refuses .*rotates in style 'half'"),
    "another family": (good(model_types=("llama",)), long_phi, "it_can_be", r"are llama, and .* of type 'phi3'"),
    "no summary": (good(summary=""), long_phi, "it_can_be", "lacks: summary"),
    "no family": (good(model_types=()), long_phi, "it_can_be", "model_types"),
    "frequencies": (good(WrongFrequencies), long_phi, "identity", "apply refuses .*differs by .* every rotary module"),
    "scaling": (
        good(ScalingForgotten),
        partial(tiny_model, "llama", rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
        "identity",
        "apply refuses .*differs by .* every rotary module",
    ),
    "short frequencies": (
        good(FrequenciesOfAShortText),
        long_phi,
        "identity",
        r"prefill with the identity plan differs from stock by [\d.]+, and must be bit-equal",
    ),
    "short frequencies, remapped": (
        good(FrequenciesOfAShortText),
        long_phi,
        "remap_equals",
        r"prefill under a remap differs from the dense judge from token \d+ on",
    ),
    "writes": (good(WritesIntoTheModel), long_phi, "detach_is_exact", "embed_tokens.weight is not what it was"),
    "leaves a hook": (
        good(LeavesAHook),
        long_phi,
        "detach_is_exact",
        "the number of hooks on model is not what it was",
    ),
    "no rotary": (good(NoRotaryModule), long_phi, "the_probe_finds", "apply refuses .*never calls its rotary module"),
    "names": (good(NamesItWrong), long_phi, "it_finds_the_parts", "'model.rotary_emb', which is no such module"),
    "decoder": (good(AnotherDecoder), long_phi, "it_finds_the_parts", "Phi3Model, which is no part of the model"),
    "window": (good(StartOfTheScaling), long_phi, "it_finds_the_parts", r"window\(model\) is 32, and should be 80"),
    "tolerance": (good(tolerance=1.0), long_phi, "identity", "a tolerance of 1 for the identity plan shows nothing"),
}


def contract(adapter: posenc.ArchitectureAdapter, model: Callable[[], Any]) -> AdapterContract:
    window = 80 if model is long_phi else WINDOW
    return type("TestMutant", (AdapterContract,), {"adapter": adapter, "model": model, "window": window})()


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_of_a_good_adapter_is_caught(mutant: str) -> None:
    adapter, build, check, says = MUTANTS[mutant]
    tests = contract(adapter, build)
    tests.model = partial(build)  # a model of its own, since a mutant may damage it
    (test,) = [getattr(tests, name) for name in dir(tests) if name.startswith(f"test_{check}")]
    before = dict(posenc.adapters())
    with pytest.raises(ContractViolation, match=re.compile(says, re.DOTALL)):
        test()
    assert dict(posenc.adapters()) == before


class TestTheGoodAdapter(AdapterContract):
    adapter = good()
    model = long_phi
    layers = ("4 x half, channels 0..7",)
    window = 80


def test_a_wrong_list_of_layers_is_shown() -> None:
    tests = contract(good(), long_phi)
    tests.layers = ("4 x interleaved, channels 0..7",)
    with pytest.raises(ContractViolation, match=r"the probe finds \['4 x half, channels 0\.\.7'\], but the contract"):
        tests.test_the_probe_finds_what_is_declared()


def test_a_model_whose_positions_hardly_matter_is_rejected() -> None:
    tests = contract(good(), partial(tiny_model, "phi3", initializer_range=0.001))
    with pytest.raises(ContractViolation, match="a remap hardly changes the model's logits"):
        tests.test_remap_equals_the_dense_judge()
