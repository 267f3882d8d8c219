"""Every built-in strategy against a plain double loop written from the specification, pair by pair."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import posenc

Pair = Callable[[int, int], Any]
small = st.integers(1, 40)
some = settings(deadline=None, max_examples=120)


def rope(p: dict[str, Any], prompt: int) -> Pair:
    return lambda i, j: i - j


def self_extend(p: dict[str, Any], prompt: int) -> Pair:
    G, w = p["group"], p["window_size"]
    return lambda i, j: i - j if i - j < w else (i // G + w - w // G) - j // G


def rerope(p: dict[str, Any], prompt: int) -> Pair:
    w = p["window_size"]
    return lambda i, j: i - j if i - j < w else w


def leaky_rerope(p: dict[str, Any], prompt: int) -> Pair:
    w, k = p["window_size"], p["factor"]
    return lambda i, j: i - j if i - j < w else (w + (i - w) / k) - j / k


def dca(p: dict[str, Any], prompt: int) -> Pair:
    C = p["chunk_size"]
    c = C - p["local_size"]

    def pair(i: int, j: int) -> int:
        apart = i // c - j // c
        query = i % c if apart == 0 else min(i % c + c, C) if apart == 1 else min(2 * c - 1, C)
        return query - j % c

    return pair


def string(p: dict[str, Any], prompt: int) -> Pair:
    S, w = p["shift"], p["window_size"]
    return lambda i, j: i - j if i - j < S else (i - S + w) - j


def lm_infinite(p: dict[str, Any], prompt: int) -> Pair:
    W, sinks = p["window_size"], p["sinks"]
    return lambda i, j: i - j if i - j < W else W if j < sinks else None


def streaming_llm(p: dict[str, Any], prompt: int) -> Pair:
    W, s = p["window_size"], p["sinks"]

    def pair(i: int, j: int) -> int | None:
        kept = [key for key in range(i + 1) if key < s or i - key < W]  # the cache, oldest first
        return kept.index(i) - kept.index(j) if j in kept else None

    return pair


def dpe(p: dict[str, Any], prompt: int) -> Pair:
    w = p["window_size"]
    return lambda i, j: [i - j if i - j < w else (i // s + w - w // s) - j // s for s in p["scales"]]


def lampe(p: dict[str, Any], prompt: int) -> Pair:
    P, H, T, U = prompt, p["head"], p["tail"], p["mapping"]
    kind = p.get("granularity", "full")

    def m(q: int) -> int:
        return (U * q) // (P - 1)

    if P < 2 * H or U >= P - 1:
        return lambda i, j: i - j
    R = max(r for r in range(5 * P + 5) if m(r) == m(T))
    if kind == "full" and P - R <= H:
        return lambda i, j: i - j
    b1 = H - m(H) - 1
    b2 = (P - 1 - R) - m(P - 1 - R) - b1
    if not p.get("continuity", True):
        b1 = b2 = 0

    def pair(i: int, j: int) -> int:
        d = i - j
        if kind == "uniform":
            return m(i) - m(j)
        if d < H:
            return d
        if kind == "head_only" or d < P - R:
            return m(i) + b1 - m(j)
        return i - b2 - j

    return pair


def fl32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def lampe_official(p: dict[str, Any], prompt: int) -> Pair:
    P, H, T, U = prompt, p["head"], p["tail"], p["mapping"]
    if P < 2 * H:
        return lambda i, j: i - j
    step = fl32(fl32(1 / (P - 1)) * fl32(U))

    def m(q: int) -> int:
        return math.floor(fl32(step * min(q, P - 1)))

    R = max(r for r in range(P) if m(r) == m(T))
    b1 = H - m(H) - 1
    b2 = (P - 1 - R) - m(P - 1 - R) - b1
    far = max(P - R, H)  # where head and tail meet, no key is between them

    def pair(i: int, j: int) -> int:
        d = i - j
        return d if d < H else m(i) + b1 - m(j) if d < far else i - b2 - j

    return pair


lampe_params = st.fixed_dictionaries(
    {"head": st.integers(1, 20), "tail": st.integers(0, 30), "mapping": st.integers(1, 60)},
    optional={"granularity": st.sampled_from(["full", "uniform", "head_only"]), "continuity": st.booleans()},
)
CASES: dict[str, tuple[str, Callable[..., Pair], st.SearchStrategy[dict[str, Any]]]] = {
    "rope": ("rope", rope, st.just({})),
    "self_extend": ("self_extend", self_extend, st.fixed_dictionaries({"group": small, "window_size": small})),
    "rerope": ("rerope", rerope, st.fixed_dictionaries({"window_size": small})),
    "leaky_rerope": (
        "leaky_rerope",
        leaky_rerope,
        st.fixed_dictionaries({"window_size": small, "factor": st.floats(1, 50)}),
    ),
    "dca": (
        "dca",
        dca,
        st.tuples(small, small).map(lambda t: {"chunk_size": t[0] + t[1], "local_size": t[1]}),
    ),
    "string": ("string", string, st.fixed_dictionaries({"shift": small, "window_size": st.integers(0, 40)})),
    "lm_infinite": (
        "lm_infinite",
        lm_infinite,
        st.fixed_dictionaries({"window_size": small, "sinks": st.integers(0, 9)}),
    ),
    "streaming_llm": (
        "streaming_llm",
        streaming_llm,
        st.fixed_dictionaries({"window_size": small, "sinks": st.integers(0, 9)}),
    ),
    "dpe": (
        "dpe",
        dpe,
        st.fixed_dictionaries({"window_size": small, "scales": st.lists(st.integers(1, 20), min_size=1, max_size=4)}),
    ),
    "lampe": ("lampe", lampe, lampe_params),
    "lampe official": (
        "lampe",
        lampe_official,
        st.fixed_dictionaries(
            {
                "head": st.integers(1, 20),
                "tail": st.integers(0, 30),
                "mapping": st.integers(1, 120),
                "compat": st.just("official"),
            }
        ),
    ),
}


def dense(pair: Pair, total: int) -> np.ndarray:
    cell = np.array(pair(0, 0), dtype=float)
    out = np.full((total, total, *cell.shape), np.nan)
    for i in range(total):
        for j in range(i + 1):
            value = pair(i, j)
            if value is not None:
                out[i, j] = value
    return out


@pytest.mark.parametrize("case", CASES)
@some
@given(data=st.data(), prompt=st.integers(1, 120), extra=st.integers(0, 60))
def test_equals_the_specification_pair_by_pair(case: str, data: st.DataObject, prompt: int, extra: int) -> None:
    name, oracle, params = CASES[case]
    given_params = data.draw(params, label="params")
    plan = posenc.strategy(name, window=64, **given_params).plan(prompt, prompt + extra)
    expected = dense(oracle(given_params, prompt), prompt + extra)
    found = plan.relative_positions()
    if name == "dpe" and found.ndim == 2:  # the text does not reach beyond the window yet
        found = np.repeat(found[..., None], expected.shape[-1], axis=-1)
    if name == "leaky_rerope":
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    else:
        np.testing.assert_array_equal(found, expected)
    plan.check(drops_keys=name in ("lm_infinite", "streaming_llm"))


DEFAULTS = {
    "self_extend": lambda n: {"group": 8, "window_size": n // 4},
    "rerope": lambda n: {"window_size": n // 8},
    "leaky_rerope": lambda n: {"window_size": n // 8, "factor": 16},
    "dca": lambda n: {"chunk_size": 3 * n // 4, "local_size": n // 8},
    "string": lambda n: {"shift": n // 3, "window_size": 128},
    "lm_infinite": lambda n: {"window_size": n // 2, "sinks": 16},
    "streaming_llm": lambda n: {"window_size": n // 2, "sinks": 4},
    "lampe": lambda n: {"head": n // 16, "tail": min(200, n // 20), "mapping": 40},
}


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("window", [61, 80, 100])
def test_defaults_are_fractions_of_the_window(name: str, window: int) -> None:
    given_params = DEFAULTS[name](window)
    plan = posenc.strategy(name, window=window, **({"mapping": 40} if name == "lampe" else {})).plan(170, 190)
    expected = dense(CASES[name][1](given_params, 170), 190)
    np.testing.assert_array_equal(plan.relative_positions(), expected)


@pytest.mark.parametrize("name", ["rerope", "leaky_rerope", "self_extend"])
def test_the_log_scale_grows_beyond_the_window(name: str) -> None:
    on = posenc.strategy(name, window=64, log_scale=True).plan(150)
    expected = [max(1.0, math.log(i + 1) / math.log(64)) for i in range(150)]
    assert on.query_scale is not None
    np.testing.assert_allclose(on.query_scale, expected, rtol=1e-14)
    assert on.query_scale[:64].tolist() == [1.0] * 64
    assert on.query_scale[64] > 1
    assert posenc.strategy(name, window=64, log_scale=True).plan(64).query_scale is None
    assert posenc.strategy(name, window=64, log_scale=False).plan(150).query_scale is None
    default = posenc.strategy(name, window=64).plan(150).query_scale
    assert (default is None) == (name == "self_extend")


@pytest.mark.parametrize("name", ["rerope", "leaky_rerope", "self_extend"])
def test_a_window_larger_than_the_prompt_gives_the_identity_even_past_the_pretraining_window(name: str) -> None:
    assert posenc.strategy(name, window=64, window_size=100, log_scale=True).plan(100).is_identity


def test_string_scales_only_the_logits_of_shifted_text() -> None:
    strategy = posenc.strategy("string", window=90)
    assert strategy.plan(30).is_identity
    scale = strategy.plan(31).query_scale
    assert scale is not None
    np.testing.assert_allclose(scale, 1.1434, atol=5e-5)
    grown = strategy.plan(30, 40).query_scale  # the prompt was read unscaled, its continuation is not
    assert grown is not None
    np.testing.assert_allclose(grown, [1.0] * 30 + [(0.1 * math.log(2) + 1) ** 2] * 10)
    assert posenc.strategy("string", window=90, attention_factor=1.0).plan(100).query_scale is None
