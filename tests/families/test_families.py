"""One family per way to deviate from Llama: identity bit-equal, a remap equal to the dense judge, detach bit-equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import posenc
from scripts.family_measure import PROMPT, STEPS, TOLERANCE, decoded, difference, relative_error, uses
from scripts.family_reference import dense_logits
from scripts.tiny_families import WINDOW, tiny_model, tokens

# family -> what it deviates in, as the probe must find it (one text per kind of layer)
DEVIATIONS: dict[str, tuple[str, ...]] = {
    "llama": ("4 x half, channels 0..15",),
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
    "modernbert-decoder": (
        "2 x half, channels 0..7, frequencies of full_attention",
        "2 x half, channels 0..7, frequencies of sliding_attention, window 16",
    ),
}
EAGER = ("gemma2",)


@pytest.fixture(scope="module", params=DEVIATIONS)
def family(request: pytest.FixtureRequest) -> tuple[str, Any]:
    return request.param, tiny_model(request.param, "eager" if request.param in EAGER else None)


def test_facts(family: tuple[str, Any]) -> None:
    name, model = family
    with posenc.apply(model, "rope", window=WINDOW) as handle:
        found = tuple(handle.layers())
    assert found == DEVIATIONS[name]


def test_identity_and_detach_are_bit_equal(family: tuple[str, Any]) -> None:
    _, model = family
    stock = uses(model)
    with posenc.apply(model, "rope", window=WINDOW):
        assert difference(uses(model), stock) == 0
    assert difference(uses(model), stock) == 0


def test_remap_equals_the_dense_judge(family: tuple[str, Any]) -> None:
    _, model = family
    ids = tokens(1, PROMPT + STEPS)
    strategy = posenc.strategy("rerope", window=WINDOW, window_size=6, replan="never")
    expected = dense_logits(model, ids, strategy.plan(PROMPT, PROMPT + STEPS).relative_positions())
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits[0]
        with posenc.apply(model, strategy):
            got = decoded(model, ids, PROMPT)[0]
    assert relative_error(got, expected) < TOLERANCE
    assert relative_error(plain, expected) > 10 * TOLERANCE


def test_remap_of_a_padded_row_equals_the_row_alone(family: tuple[str, Any]) -> None:
    _, model = family
    ids = tokens(2, PROMPT + STEPS, seed=3)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad(), posenc.apply(model, "rerope", window=WINDOW, window_size=6, replan="never"):
        both = decoded(model, ids, PROMPT, mask)
        alone = decoded(model, ids[:1, 7:], PROMPT - 7)
    assert relative_error(both[0, 7:], alone[0]) < TOLERANCE


@pytest.mark.parametrize("name", ["olmo2", "cohere2", "ernie4_5"])
def test_identity_in_bfloat16(name: str) -> None:
    model = tiny_model(name).to(torch.bfloat16)
    stock = uses(model)
    with posenc.apply(model, "rope", window=WINDOW):
        assert difference(uses(model), stock) == 0


def test_the_judge_agrees_with_stock(family: tuple[str, Any]) -> None:
    _, model = family
    ids = tokens(1, 30)
    rope = posenc.strategy("rope", window=WINDOW).plan(30)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits[0]
    assert relative_error(dense_logits(model, ids, rope.relative_positions()), plain) < TOLERANCE
