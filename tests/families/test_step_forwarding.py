"""Families whose layers drop keyword arguments: a forward that fails leaves no step behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import posenc
from posenc.testing.models import decoded
from scripts.tiny_families import WINDOW, tiny_model, tokens

DROPPING = ("stablelm", "nemotron")


class Broken(Exception):
    """Raised inside a layer."""


def broken(*_: Any) -> None:
    raise Broken


def attention_of(model: Any, layer: int = 1) -> Any:
    return model.model.layers[layer].self_attn


def call(model: Any, length: int = 9) -> Any:
    """Call an attention module on its own, as no decoder does."""
    hidden = torch.randn(1, length, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = model.model.rotary_emb(hidden, torch.arange(length)[None])
    return attention_of(model)(hidden, position_embeddings=positions, attention_mask=None)


PLACES = {
    "before the attention": lambda layer: layer.self_attn.q_proj,
    "inside the attention": lambda layer: layer.self_attn.o_proj,
    "after the attention": lambda layer: layer.mlp,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", DROPPING)
@pytest.mark.parametrize("number", [0, 1])
def test_a_failed_forward_leaves_nothing_behind(family: str, place: str, number: int) -> None:
    model, ids = tiny_model(family), tokens(1, 30)
    with torch.no_grad(), posenc.apply(model, "rerope", window=WINDOW, window_size=6):
        expected = decoded(model, ids, 25)
        hook = PLACES[place](model.model.layers[number]).register_forward_pre_hook(broken)
        with pytest.raises(Broken):
            model(ids)
        hook.remove()
        with pytest.raises(posenc.UnsupportedModelError, match="outside its decoder"):
            call(model)
        assert torch.equal(decoded(model, ids, 25), expected)


@pytest.mark.parametrize("family", DROPPING)
def test_a_step_is_not_used_by_a_second_model(family: str) -> None:
    """While a layer of one model runs, attention of another model outside its decoder must not use its step."""
    first, second = tiny_model(family), tiny_model(family)
    messages: list[str] = []

    def between(*_: Any) -> None:
        with pytest.raises(posenc.PosencError) as caught:
            call(second)
        messages.append(str(caught.value))

    with (
        torch.no_grad(),
        posenc.apply(first, "rerope", window=WINDOW, window_size=6),
        posenc.apply(second, "rerope", window=WINDOW, window_size=6),
    ):
        expected = first(tokens(1, 30)).logits
        hook = first.model.layers[1].mlp.register_forward_pre_hook(between)
        assert torch.equal(first(tokens(1, 30)).logits, expected)
        hook.remove()
    assert len(messages) == 1


@pytest.mark.parametrize("family", DROPPING)
def test_attention_can_be_called_after_the_strategy_is_removed(family: str) -> None:
    model, ids = tiny_model(family), tokens(1, 30)
    with torch.no_grad():
        stock = call(model)[0]
        with posenc.apply(model, "rerope", window=WINDOW, window_size=6):
            hook = model.model.layers[0].mlp.register_forward_pre_hook(broken)
            with pytest.raises(Broken):
                model(ids)
            hook.remove()
        assert torch.equal(call(model)[0], stock)
