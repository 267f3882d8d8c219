"""Mistakes in a plugin's strategy: ``posenc.apply`` names the strategy and the part, and undoes everything."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import create_model

import posenc
from posenc import Capabilities, Lengths, PositionPlan, Rotary, Segment
from posenc.plugins import RESERVED, strategy_info
from tests.hf import tiny

FREQUENCIES = 8


class Wrong(posenc.PositionStrategy):
    """A correct strategy with two segments, a scale and the model's frequencies; each test replaces one of them."""

    name = "wrong"
    summary = "one mistake"
    paper = "an example"

    def segments(self, lengths: Lengths) -> Any:
        index = lengths.indices
        return (
            Segment.band("near", lengths.total, 0, 9, index, index),
            Segment.band("far", lengths.total, 9, None, index * 0 + 9, index * 0),
        )


def with_far(**changes: Callable[[Any], Any]) -> Callable[[Any, Lengths], Any]:
    """Return a ``segments`` method whose second segment has changed arrays."""

    def segments(self: Any, lengths: Lengths) -> Any:
        near, far = Wrong.segments(self, lengths)
        return near, replace(far, **{key: change(getattr(far, key)) for key, change in changes.items()})

    return segments


def scaled(value: Callable[[int], Any]) -> Callable[[Any, Lengths], Any]:
    return lambda self, lengths: value(lengths.total)


def one_bad(value: float) -> Callable[[int], Any]:
    def scale(total: int) -> Any:
        scales = np.ones(total)
        scales[-1] = value
        return scales

    return scale


class Wide(Wrong):
    capabilities = Capabilities(positions_per_frequency=True)


def crash(self: Any, lengths: Lengths) -> Any:
    yield Segment.band("near", lengths.total, 0, None, lengths.indices, lengths.indices)
    raise ZeroDivisionError("in a generator")


MISTAKES: list[tuple[str, Any, str]] = [
    ("segments", lambda self, lengths: None, "segments must be a sequence of Segment, got None"),
    ("segments", lambda self, lengths: Wrong.segments(self, lengths)[0], "must be a sequence of Segment, got Segment"),
    ("segments", lambda self, lengths: {"near": 1}, "must be a sequence of Segment, got {'near': 1}"),
    ("segments", lambda self, lengths: [(0, 1)], r"one of them is \(0, 1\)"),
    ("segments", lambda self, lengths: (), r"pair \(i=0, j=0\) is attended by no segment"),
    ("segments", crash, "ZeroDivisionError: in a generator"),
    ("segments", with_far(key_start=list), "'far': key_start must be a numpy array of int64, got a list"),
    ("segments", with_far(key_stop=lambda a: a.astype(float)), "'far': key_stop must be int64, got float64"),
    ("segments", with_far(key_stop=lambda a: a[:, None]), r"'far': key_stop must have shape \[\d+\]"),
    ("segments", with_far(query_positions=list), "'far': query_positions must be a numpy array of int64 or float64"),
    ("segments", with_far(query_positions=torch.as_tensor), "'far': query_positions must be .* got a Tensor"),
    ("segments", with_far(key_positions=lambda a: a[:-1]), r"'far': key_positions must "),
    ("segments", with_far(key_positions=lambda a: a.astype(np.float32)), "'far': key_positions must .* got float32"),
    ("segments", with_far(key_positions=lambda a: a.astype(object)), "'far': key_positions must be .* got object"),
    ("segments", with_far(key_positions=lambda a: a.astype(bool)), "'far': key_positions must be .* got bool"),
    ("segments", with_far(key_positions=lambda a: a.astype(np.uint64)), "'far': key_positions must .* got uint64"),
    ("segments", with_far(query_positions=lambda a: a[:, None, None]), "'far': query_positions must have shape"),
    ("segments", with_far(query_positions=lambda a: a[0]), "'far': query_positions must"),
    ("segments", with_far(query_positions=lambda a: a / 0.0 * 0), "'far': query_positions hold a NaN"),
    ("segments", with_far(key_positions=lambda a: a - np.inf), "'far': key_positions hold a NaN or an infinity"),
    ("segments", with_far(interpolation=lambda a: "cubic"), "'far': interpolation must be"),
    ("segments", with_far(query_positions=lambda a: a[:, None].repeat(FREQUENCIES, 1)), "'far' has positions with col"),
    ("query_scale", scaled(lambda total: 1.5), "query_scale must be a numpy array of float64, got a float"),
    ("query_scale", scaled(lambda total: [1.5] * total), "query_scale must be .* got a list"),
    ("query_scale", scaled(lambda total: np.ones(total + 1)), r"query_scale must have shape \[1\], got \[2\]"),
    ("query_scale", scaled(lambda total: np.ones((total, 1))), r"query_scale must have shape \[1\], got \[1, 1\]"),
    ("query_scale", scaled(lambda total: np.ones(total, int)), "query_scale must be float64, got int64"),
    ("query_scale", scaled(one_bad(np.nan)), "query_scale is nan at query"),
    ("query_scale", scaled(one_bad(np.inf)), "query_scale is inf at query"),
    ("query_scale", scaled(one_bad(0.0)), "query_scale is 0.0 at query"),
    ("query_scale", scaled(one_bad(-2.0)), "query_scale is -2.0 at query"),
    ("plan", lambda self, prompt, total=None: None, r"plan\(\) must return a PositionPlan, got None"),
    (
        "plan",
        lambda self, prompt, total=None: PositionPlan.identity(Lengths(prompt, prompt)),
        r"\(prompt \d+, total \d+\): it is a plan for prompt",
    ),
    ("rotary", lambda self, base, prompt: None, r"rotary\(base, 1\) returns None, not a Rotary"),
    ("rotary", lambda self, base, prompt: 1 / 0, r"rotary\(base, 1\) fails: ZeroDivisionError"),
    ("rotary", lambda self, base, prompt: replace(base, style="interleaved"), "changes the layout"),
    ("rotary", lambda self, base, prompt: Rotary(base.inv_freq[:4]), "changes the layout"),
    ("rotary", lambda self, base, prompt: base.with_frequencies(base.inv_freq * np.nan, 1.0), "not finite"),
    ("rotary", lambda self, base, prompt: base.with_frequencies(base.inv_freq, 0.0), "not finite and positive"),
    ("rotary", lambda self, base, prompt: base.with_frequencies(base.inv_freq / 2, 1.0), "changes_frequencies=True"),
]


def refused(strategy: posenc.PositionStrategy, says: str, error: type[Exception] = posenc.PluginError) -> None:
    with pytest.raises(error, match=says) as caught:
        posenc.apply(MODEL, strategy)
    assert "'wrong'" in str(caught.value) or strategy.name in str(caught.value)
    assert posenc.attached(MODEL) is None


MODEL = tiny.make("llama")


@pytest.mark.parametrize(("method", "does", "says"), MISTAKES, ids=[f"{m}-{s[:40]}" for m, _, s in MISTAKES])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_mistake_is_named_at_apply(method: str, does: Any, says: str) -> None:
    refused(type("Mistaken", (Wrong,), {method: does})(window=tiny.WINDOW), says)


def test_the_strategy_without_a_mistake_is_accepted() -> None:
    for good in (Wrong, type("Generated", (Wrong,), {"segments": lambda self, n: iter(Wrong.segments(self, n))})):
        with posenc.apply(MODEL, good(window=tiny.WINDOW)), torch.no_grad():
            assert MODEL(tiny.tokens(1, 30)).logits.isfinite().all()


def test_undeclared_frequencies_by_length_are_refused() -> None:
    """They would be cached for all lengths, so every later prompt would get those of the first."""

    class Mistaken(Wrong):
        capabilities = Capabilities(changes_frequencies=True)

        def rotary(self, base: Rotary, prompt: int) -> Rotary:
            return base.with_frequencies(base.inv_freq / (1 + prompt // 100), base.attention_scaling)

    refused(Mistaken(window=tiny.WINDOW), "frequencies_by_length=True")


def test_positions_have_one_column_for_each_frequency() -> None:
    def wide(columns: int) -> type[Wide]:
        change = with_far(query_positions=lambda a: a[:, None].repeat(columns, 1))
        return type("Mistaken", (Wide,), {"segments": change})

    for columns in (2, 4, 16):  # 4 is the number of heads
        says = f"'far': query_positions have {columns} columns, and the model has {FREQUENCIES} rotary frequencies"
        refused(wide(columns)(window=tiny.WINDOW), says)
    for columns in (1, FREQUENCIES):
        posenc.apply(MODEL, wide(columns)(window=tiny.WINDOW)).remove()


def test_the_number_of_dpe_scales_is_checked_at_apply() -> None:
    for params in ({"scales": [1, 2, 3]}, {"scales": [1, 2, 3], "frequencies": "yarn"}):
        with pytest.raises(posenc.InvalidConfigError, match=r"^dpe\.scales: 3 scales given, but the model has 8"):
            posenc.apply(MODEL, "dpe", **params)
    auto = {"ranges": [{"up_to": 9, "pick": {"strategy": "dpe", "params": {"scales": [1, 2, 3]}, "because": ""}}]}
    with pytest.raises(posenc.InvalidConfigError, match=r"^dpe\.scales: 3 scales"):
        posenc.apply(MODEL, "auto", calibration=auto)
    assert posenc.attached(MODEL) is None


def test_a_strategy_is_told_the_number_of_frequencies() -> None:
    class Fitted(Wide):
        count = 1

        def for_frequencies(self, count: int) -> posenc.PositionStrategy:
            strategy = type(self)(window=self.window)
            strategy.count = count
            return strategy

        def segments(self, lengths: Lengths) -> Any:
            return with_far(query_positions=lambda a: a[:, None].repeat(self.count, 1))(self, lengths)

    with posenc.apply(MODEL, Fitted(window=tiny.WINDOW)) as handle:
        assert handle.plan(30).segments[-1].query_positions.shape == (30, FREQUENCIES)


def test_argument_names_of_apply_are_reserved() -> None:
    taken = [*inspect.signature(posenc.apply).parameters, *inspect.signature(posenc.strategy).parameters, "self"]
    assert set(RESERVED) == set(taken)
    for name in RESERVED:
        params = create_model("Mistaken", __base__=posenc.RemapParams, **{name: (int, 1)})
        with pytest.raises(posenc.PluginError, match=rf"strategy 'wrong': its parameters {name} have names"):
            strategy_info(type("Mistaken", (Wrong,), {"Params": params}), "a distribution")
