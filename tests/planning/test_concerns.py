"""A handle warns once, for each kind, of a plan that is valid but probably not intended."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch

import posenc
from posenc.planning.concerns import concerns
from tests.hf import tiny


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "posenc")
    return caplog


def generate(model: Any, length: int) -> None:
    ids = tiny.tokens(1, length)
    with torch.no_grad():
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        (
            "self_extend",
            {"group": 2, "window_size": 40},
            "prompt of 150 tokens sees distances up to 94, but the window is 64",
        ),
        (
            "self_extend",
            {"window_size": 500},
            "prompt of 150 tokens is longer than the window of 64, but its plan moves nothing",
        ),
        ("lampe", {"mapping": 5000}, "its plan moves nothing"),
        ("rerope", {"active_from": 1000}, "its plan moves nothing.*active_from"),
        ("leaky_rerope", {"factor": 1.5}, "sees distances up to"),
    ],
)
def test_a_handle_warns_once(name: str, params: dict[str, Any], says: str, said: pytest.LogCaptureFixture) -> None:
    model = tiny.make("llama")
    with posenc.apply(model, name, **params):
        generate(model, 30)
        assert not said.messages  # there is nothing to warn about inside the window
        generate(model, 150)
        generate(model, 150)
        generate(model, 160)
    (message,) = said.messages
    assert message.startswith(f"{name}: ")
    with posenc.apply(model, name, **params):
        generate(model, 150)
    assert len(said.messages) == 2
    assert re.search(says, message)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("rope", {}),
        ("rerope", {}),
        ("streaming_llm", {}),
        ("ntk", {}),
        ("self_extend", {"group": 8, "window_size": 16}),
        ("leaky_rerope", {"factor": 1.5, "frequencies": "linear"}),
    ],
)
def test_intended_plans_cause_no_warning(name: str, params: dict[str, Any], said: pytest.LogCaptureFixture) -> None:
    model = tiny.make("llama")
    with posenc.apply(model, name, **params):
        generate(model, 150)
    assert not said.messages


def test_a_long_prompt_is_judged_by_its_own_distances() -> None:
    strategy = posenc.strategy("self_extend", window=64, group=2, window_size=40)
    assert concerns(strategy, strategy.plan(64, 400)) == {}
    assert list(concerns(strategy, strategy.plan(100, 400))) == ["leaves"]
    assert list(concerns(strategy, strategy.plan(150))) == ["leaves"]
    unknown = posenc.strategy("self_extend", group=2, window_size=40)
    assert concerns(unknown, unknown.plan(150)) == {}


def test_a_profile_of_another_model_is_named(said: pytest.LogCaptureFixture) -> None:
    model = tiny.make("llama")
    posenc.apply(model, "lampe", mapping="llama3").remove()
    (message,) = said.messages
    assert "'llama3' was fitted for a model with a window of 8192 tokens, and this one has 64" in message
    posenc.apply(model, "lampe", mapping="llama3", window=8192).remove()
    posenc.apply(model, "lampe", mapping=40).remove()
    assert len(said.messages) == 1
