"""If a model's own frequencies change while a strategy is applied, the new ones are used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import posenc
from posenc.testing.models import difference, model_outputs
from scripts.tiny_families import tiny_model
from tests.hf import tiny
from tests.hf.dense import dense_logits

PROMPT, TOTAL = 80, 84
TOLERANCE = 1e-4


def in_place(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def one_entry(model: Any) -> None:
    model.model.rotary_emb.inv_freq[3] = 0.25


def through_a_view(model: Any) -> None:
    model.model.rotary_emb.inv_freq[2:].zero_()


def replaced(model: Any) -> None:
    module = model.model.rotary_emb
    module.inv_freq = module.inv_freq.flip(0)


def rounded(model: Any) -> None:
    model.bfloat16().float()


def twice(model: Any) -> None:
    in_place(model)
    replaced(model)


CHANGES = (in_place, one_entry, through_a_view, replaced, rounded, twice)
STRATEGIES: dict[str, dict[str, Any]] = {
    "rope": {},
    "lampe": {**tiny.LAMPE, "replan": "never"},
    "rerope": {"window_size": 12, "replan": "never"},
}


def logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of a prompt and decoded tokens, on a fresh cache."""
    return tiny.decoded(model, ids, PROMPT, DynamicCache(config=model.config))[0]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_new_frequencies_are_used(change: Callable[[Any], None], name: str) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, TOTAL)
    strategy = posenc.strategy(name, window=tiny.WINDOW, **STRATEGIES[name])
    with torch.no_grad(), posenc.apply(model, strategy):
        before = logits(model, ids)  # fills every cache of frequencies
        change(model)
        got = logits(model, ids)
        expected = dense_logits(model, ids[0], tiny.positions(model, strategy, PROMPT, TOTAL))
        assert (got - expected).abs().max() < TOLERANCE
        assert (got - before).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("change", CHANGES)
def test_the_identity_stays_bit_equal_and_removal_keeps_the_new_frequencies(change: Callable[[Any], None]) -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, TOTAL)
    with torch.no_grad():
        with posenc.apply(model, "rope"):
            logits(model, ids)
            change(model)
            got = logits(model, ids)
        twin = tiny.make("llama")
        change(twin)
        assert torch.equal(got, logits(twin, ids))
        assert torch.equal(logits(model, ids), got)


def test_a_change_of_one_set_of_two_is_detected() -> None:
    model, ids = tiny_model("gemma3_text"), tiny.tokens(2, 50)
    with posenc.apply(model, "rope", window=tiny.WINDOW):
        model_outputs(model, ids, 45)
        for kind in ("sliding_attention", "full_attention"):
            getattr(model.model.rotary_emb, f"{kind}_inv_freq").mul_(0.5)
            got = model_outputs(model, ids, 45)
            twin = copy.deepcopy(model)
            copied = posenc.attached(twin)
            assert copied is not None
            copied.remove()
            stock = model_outputs(twin, ids, 45)
            assert {use: difference(got[use], stock[use]) for use in stock} == dict.fromkeys(got, 0.0)


def test_a_change_back_is_detected() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, TOTAL)
    inv_freq = model.model.rotary_emb.inv_freq
    with torch.no_grad(), posenc.apply(model, "lampe", **STRATEGIES["lampe"]):
        first = logits(model, ids)
        inv_freq.mul_(2)
        second = logits(model, ids)
        inv_freq.div_(2)
        assert torch.equal(logits(model, ids), first)
        assert not torch.equal(second, first)


def test_a_copy_of_the_model_has_its_own_frequencies() -> None:
    model, ids = tiny.make("llama"), tiny.tokens(1, TOTAL)
    with torch.no_grad(), posenc.apply(model, "lampe", **STRATEGIES["lampe"]):
        first = logits(model, ids)
        twin = copy.deepcopy(model)
        in_place(twin)
        assert not torch.equal(logits(twin, ids), first)
        assert torch.equal(logits(model, ids), first)
