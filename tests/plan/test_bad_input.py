"""Bad lengths, parameters and names: every message says which key is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import posenc

NAMES = list(posenc.strategies())


@pytest.mark.parametrize("name", ["rope", "rerope", "yarn"])
@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ((0,), "prompt must be at least 1 token, got 0"),
        ((-5,), "prompt must be at least 1 token, got -5"),
        ((10, 9), r"total \(9\) must be at least prompt \(10\)"),
        ((10, -1), "total"),
        ((2.0,), r"prompt must be a whole number of tokens, got 2.0 \(float\)"),
        ((True,), "prompt must be a whole number"),
        (("7",), "prompt must be a whole number"),
        ((7, 8.5), "total must be a whole number"),
    ],
)
def test_bad_lengths_are_refused(name: str, lengths: tuple[Any, ...], says: str) -> None:
    strategy = posenc.strategy(name, window=64)
    with pytest.raises(posenc.InvalidInputError, match=says) as caught:
        strategy.plan(*lengths)
    assert isinstance(caught.value, ValueError)


def test_numpy_integers_are_accepted_as_lengths() -> None:
    assert posenc.strategy("rope").plan(np.int64(5), np.int32(7)).total == 7


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_parameter_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(posenc.InvalidConfigError) as caught:
        posenc.strategy(name, window=64, widnow_size=3)
    message = str(caught.value)
    assert message.startswith(f"{name}.widnow_size: no such key. Known keys: ")
    for key in posenc.strategies()[name].params.model_fields:
        assert key in message


def test_self_is_not_a_parameter() -> None:
    with pytest.raises(posenc.InvalidConfigError, match=r"^rerope\.self: no such key. Known keys: active_from"):
        posenc.strategy("rerope", window=64, **{"self": 1})


@pytest.mark.parametrize(
    ("name", "params", "key"),
    [
        ("self_extend", {"group": 0}, "group"),
        ("self_extend", {"group": 1.5}, "group"),
        ("self_extend", {"window_size": -1}, "window_size"),
        ("self_extend", {"log_scale": "perhaps"}, "log_scale"),
        ("rerope", {"window_size": 0}, "window_size"),
        ("leaky_rerope", {"factor": 0.5}, "factor"),
        ("leaky_rerope", {"factor": float("nan")}, "factor"),
        ("leaky_rerope", {"factor": float("inf")}, "factor"),
        ("dca", {"chunk_size": 8, "local_size": 8}, "local_size"),
        ("dca", {"chunk_size": 8, "local_size": 9}, "local_size"),
        ("dca", {"chunk_size": 0}, "chunk_size"),
        ("string", {"shift": 0}, "shift"),
        ("string", {"window_size": -1}, "window_size"),
        ("string", {"attention_factor": 0}, "attention_factor"),
        ("lm_infinite", {"sinks": -1}, "sinks"),
        ("streaming_llm", {"window_size": 0}, "window_size"),
        ("dpe", {"scales": []}, "scales"),
        ("dpe", {"scales": [4, 0]}, "scales.1"),
        ("lampe", {"head": 0}, "head"),
        ("lampe", {"tail": -1}, "tail"),
        ("lampe", {"attention_factor": -1}, "attention_factor"),
        ("lampe", {"granularity": "fine"}, "granularity"),
        ("lampe", {"compat": "bugs"}, "compat"),
        ("rope", {"active_from": -1}, "active_from"),
        ("rope", {"replan": "sometimes"}, "replan"),
        ("rope", {"replan": 0}, "replan"),
        ("linear", {"factor": 0.5}, "factor"),
        ("ntk", {"factor": "big"}, "factor"),
        ("dynamic", {"factor": float("inf")}, "factor"),
        ("yarn", {"factor": 0}, "factor"),
        ("yarn", {"beta_fast": 1, "beta_slow": 2}, "beta_slow"),
        ("llama3", {"low_freq_factor": 4, "high_freq_factor": 4}, "low_freq_factor"),
        ("longrope", {"long_factor": [1, -1]}, "long_factor.1"),
    ],
)
def test_wrong_values_name_their_key(name: str, params: dict[str, Any], key: str) -> None:
    with pytest.raises(posenc.InvalidConfigError, match=rf"^{name}\.{key}\b"):
        posenc.strategy(name, window=64, **params)


@pytest.mark.parametrize("window", [0, -4, 2.5, True, "4096"])
def test_bad_windows_are_refused(window: Any) -> None:
    with pytest.raises(posenc.InvalidConfigError, match=r"^rope\.window: "):
        posenc.strategy("rope", window=window)


@pytest.mark.parametrize(
    ("name", "params", "key"),
    [
        ("self_extend", {}, "window_size"),
        ("self_extend", {"window_size": 8, "log_scale": True}, "log_scale"),
        ("rerope", {"log_scale": False}, "window_size"),
        ("rerope", {"window_size": 8, "log_scale": True}, "log_scale"),
        ("leaky_rerope", {"window_size": 8, "log_scale": True}, "log_scale"),
        ("dca", {"local_size": 4}, "chunk_size"),
        ("dca", {"chunk_size": 4}, "local_size"),
        ("string", {}, "shift"),
        ("lm_infinite", {}, "window_size"),
        ("streaming_llm", {}, "window_size"),
        ("dpe", {}, "window_size"),
        ("lampe", {"head": 4, "tail": 4}, "mapping"),
        ("lampe", {"head": 4, "mapping": 9}, "tail"),
        ("lampe", {"tail": 4, "mapping": 9}, "head"),
    ],
)
def test_a_default_that_needs_the_window_says_so(name: str, params: dict[str, Any], key: str) -> None:
    with pytest.raises(posenc.InvalidConfigError, match=rf"^{name}\.{key}: .*Pass window="):
        posenc.strategy(name, **params)


def test_no_window_is_needed_when_all_sizes_are_given() -> None:
    posenc.strategy("self_extend", window_size=4).plan(50).check()
    unscaled = posenc.strategy("rerope", window_size=4)  # the log scale is on only if the window is known
    assert unscaled.plan(50).query_scale is None
    assert posenc.strategy("rerope", window_size=4, window=20).plan(50).query_scale is not None
    posenc.strategy("rerope", window_size=4, log_scale=False).plan(50).check()
    posenc.strategy("lampe", head=4, tail=2, mapping=20).plan(50).check()
    posenc.strategy("dca", chunk_size=8, local_size=2).plan(50).check()


@pytest.mark.parametrize(("typed", "meant"), [("lamp", "lampe"), ("self-extend", "self_extend"), ("Yarn", "yarn")])
def test_an_unknown_strategy_suggests_the_nearest_name(typed: str, meant: str) -> None:
    with pytest.raises(posenc.UnknownNameError, match=f"Did you mean {meant!r}") as caught:
        posenc.strategy(typed)
    assert isinstance(caught.value, LookupError)
    for name in NAMES:
        assert name in str(caught.value)


def test_every_strategy_is_registered_with_its_metadata() -> None:
    from posenc.params import Params

    for name, info in posenc.strategies().items():
        assert info.name == name
        assert info.summary
        assert issubclass(info.params, Params)
        if info.distribution == "posenc":
            assert any(char.isdigit() for char in info.paper)  # at least a year
            assert all(field.description for field in info.params.model_fields.values())


def test_describe_and_repr_rebuild_the_strategy() -> None:
    made = posenc.strategy("self_extend", window=128, group=4)
    assert made.describe() == {"name": "self_extend", "group": 4}
    assert repr(made) == "SelfExtend(window=128, group=4)"
    again = posenc.strategy(**made.describe(), window=128)
    assert again.plan(200).max_relative == made.plan(200).max_relative


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("lampe", {"head": 1000, "tail": 5, "mapping": 30}),
        ("lampe", {"head": 8, "tail": 1000, "mapping": 30}),
        ("self_extend", {"window_size": 1000}),
        ("rerope", {"window_size": 1000}),
        ("leaky_rerope", {"window_size": 1000}),
        ("dca", {"chunk_size": 1000, "local_size": 10}),
        ("string", {"shift": 1000}),
        ("lm_infinite", {"window_size": 1000}),
        ("streaming_llm", {"window_size": 1000}),
        ("dpe", {"window_size": 1000}),
    ],
)
def test_sizes_beyond_the_prompt_give_the_identity_plan(name: str, params: dict[str, Any]) -> None:
    assert posenc.strategy(name, window=64, **params).plan(300).is_identity
