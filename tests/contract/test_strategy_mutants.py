"""Copies of a good strategy with one mistake each: the contract names every mistake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hypothesis
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import PositiveInt

import posenc
from posenc import Capabilities, Lengths, PositionPlan, Retention, Rotary, Segment
from posenc.testing import ContractViolation, StrategyContract


class GoodParams(posenc.RemapParams):
    near: PositiveInt = 6


class Good(posenc.PositionStrategy):
    """Exact up to ``near``, then one constant distance; logits of late queries are scaled."""

    name = "good"
    summary = "what every mutant is made from"
    paper = "an example"
    Params = GoodParams
    capabilities = Capabilities(bounded=True)

    @property
    def near(self) -> int:
        return int(self.params.near)

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        index, total = lengths.indices, lengths.total
        return (
            Segment.band("head", total, 0, self.near, index, index),
            Segment.band("middle", total, self.near, None, index * 0 + self.near, index * 0),
        )

    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        scale = 1 + np.log1p(lengths.indices / 100)
        scale[: self.near + 1] = 1.0
        return scale


class CountedTwice(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        _, middle = super().segments(lengths)
        return Segment.band("head", lengths.total, 0, self.near + 1, lengths.indices, lengths.indices), middle


class Missed(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, key_start=np.minimum(1, np.maximum(middle.key_stop, 0)))


class BoundOffByOne(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return replace(head, key_stop=head.key_stop + 1), middle


class BoundDecreases(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        cut = np.where(lengths.indices % 20 == 19, middle.key_stop - 3, middle.key_stop)
        return replace(head, key_start=np.maximum(cut, 0)), replace(middle, key_stop=cut)


class NotFinite(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, key_positions=np.where(lengths.indices == 4, np.nan, 0.0))


class DropsItself(Good):
    capabilities = Capabilities(drops_keys=True)

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        return (Segment.band("head", lengths.total, 1, None, lengths.indices, lengths.indices),)


class DecodesDifferently(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, query_positions=middle.query_positions + lengths.total / 1000)


class FirstStepDiffers(Good):
    """Treats the last query differently, as published code does."""

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        query = middle.query_positions.copy()
        query[-1] += lengths.total > 2 * self.near
        return head, replace(middle, query_positions=query)


class LeavesTheWindow(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        index = lengths.indices // 3
        return head, replace(middle, query_positions=index + self.near, key_positions=index)


class NotMonotone(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, query_positions=middle.query_positions - 2)


class SeesAhead(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, query_positions=middle.query_positions * 0 - 1)


class ScaleForgottenInDecode(Good):
    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        return super().query_scale(lengths) if lengths.total == lengths.prompt else None


class ScaleOnTheIdentity(Good):
    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        return np.full(lengths.total, 1.1)


class ActiveFromIgnored(Good):
    def plan(self, prompt: int, total: int | None = None) -> PositionPlan:
        lengths = Lengths(prompt, total or prompt)
        return PositionPlan.build(lengths, self.segments(lengths), query_scale=self.query_scale(lengths))


class LayerMisses(Good):
    def for_layer(self, layer: int, layers: int) -> posenc.PositionStrategy:
        return Missed(window=self.window) if layer == 1 else self


class LayersIgnoreActiveFrom(Good):
    def for_layer(self, layer: int, layers: int) -> posenc.PositionStrategy:
        return Good(window=self.window, near=layer + 1)


class NoLayer(Good):
    def for_layer(self, layer: int, layers: int) -> posenc.PositionStrategy:
        return None  # type: ignore[return-value]


class MixesInDecode(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        kind: Any = "logits" if lengths.total > lengths.prompt else "positions"
        index = lengths.indices
        return (Segment.band("all", lengths.total, 0, None, index, index / 2, kind),)


class UsesThePrompt(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, query_positions=middle.query_positions + lengths.prompt / 500)


class KeepsState(Good):
    seen = 0

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        self.seen = max(self.seen, lengths.total)
        head, middle = super().segments(lengths)
        return head, replace(middle, query_positions=middle.query_positions + self.seen / 1000)


class ReportsLess(Good):
    def plan(self, prompt: int, total: int | None = None) -> PositionPlan:
        class Modest(PositionPlan):
            @property
            def max_relative(self) -> float:
                return min(super().max_relative, 5.0)

        plan = super().plan(prompt, total)
        return Modest(plan.prompt, plan.total, plan.segments, plan.query_scale, plan.window, plan.strategy)


class AttendsWhatACacheDrops(Good):
    @property
    def retention(self) -> Retention:
        return Retention(2, self.near)


class RetainedKeysMove(Good):
    """Sinks keep their true distance: after a cache drops the keys in between, they would appear nearer."""

    capabilities = Capabilities(drops_keys=True)

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, _ = super().segments(lengths)
        index = lengths.indices
        stop = np.clip(index - (self.near - 1), 0, 2)
        return head, Segment("sinks", np.zeros_like(index), stop, index, index)

    def query_scale(self, lengths: Lengths) -> NDArray[np.float64] | None:
        return None

    @property
    def retention(self) -> Retention:
        return Retention(2, self.near)


class ScaleOfRetainedKeysGrows(Good):
    capabilities = Capabilities(drops_keys=True)

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        return super().segments(lengths)[:1]

    @property
    def retention(self) -> Retention:
        return Retention(0, self.near)


class ForgetsInDescribe(Good):
    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


class AcceptsAnything(Good):
    def __init__(self, *, window: int | None = None, near: int = 6, active_from: int = 0, **ignored: Any) -> None:
        super().__init__(window=window, near=near, active_from=active_from)


class TouchesFrequencies(Good):
    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        return base.with_frequencies(base.inv_freq / 2, 1.0) if prompt > 100 else base


class StartsFromTheta(Good):
    """Loses a checkpoint's own scaling, as transformers does."""

    capabilities = Capabilities(bounded=True, changes_frequencies=True)

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        assert base.theta is not None
        plain = Rotary.from_theta(base.theta, 2 * len(base.inv_freq))
        return base.with_frequencies(plain.inv_freq / 2, base.attention_scaling)


class DropsTheAttentionFactor(Good):
    capabilities = Capabilities(bounded=True, changes_frequencies=True)

    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        return base.with_frequencies(base.inv_freq / 2, 1.0)


class ColumnsUndeclared(Good):
    """Has columns without saying whether they are for frequencies or for heads."""

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, query_positions=np.repeat(middle.query_positions[:, None], 16, 1))


class ColumnsPerHead(ColumnsUndeclared):
    capabilities = Capabilities(bounded=True, positions_per_frequency=True)


MUTANTS: list[tuple[type[Good], str, str]] = [
    (CountedTwice, "partition", r"pair \(i=\d+, j=\d+\) is attended by segments 'head' and 'middle'"),
    (Missed, "partition", r"pair \(i=\d+, j=0\) is attended by no segment"),
    (BoundOffByOne, "partition", r"pair \(i=(\d+), j=\d+\) lies in the future"),
    (BoundDecreases, "partition", r"segment '\w+': key_\w+ decreases from \d+ at query 18 to \d+ at query 19"),
    (NotFinite, "partition", r"segment 'middle': key_positions is nan at token 4"),
    (DropsItself, "partition", r"query \d+ does not attend itself"),
    (DecodesDifferently, "prefill_equals_decode", r"decoding differs from prefill at query \d+: pair \(i=.*seen at"),
    (FirstStepDiffers, "prefill_equals_decode", r"decoding differs from prefill at query \d+: pair \(i=.*seen at"),
    (LeavesTheWindow, "bounded", r"relative distance \d+, beyond the window of \d+ tokens, although .*bounded=True"),
    (NotMonotone, "order", r"pair .* is seen at 5 and the farther pair .* at 4\. .*monotone=False"),
    (SeesAhead, "order", r"pair .* is seen at relative distance -1, below 0"),
    (
        ScaleForgottenInDecode,
        "prefill_equals_decode",
        r"at query \d+: query_scale is 1 in the plan of \d+ tokens and 1\.",
    ),
    (ScaleOnTheIdentity, "identity", r"every pair keeps its true distance, but query_scale is 1\.1 at query 0"),
    (ActiveFromIgnored, "active_from", r"active_from is \d+, but pair \(i=7, j=0\) is seen at 6"),
    (LayerMisses, "layers", r"layer 1 of 3: pair \(i=\d+, j=0\) is attended by no segment"),
    (LayersIgnoreActiveFrom, "layers", r"layer \d of 3: active_from is \d+, but pair"),
    (NoLayer, "layers", r"for_layer\(0, 3\) returns None, not a strategy"),
    (
        MixesInDecode,
        "prefill_equals_decode",
        r"at query \d+: the logit of pair \(i=1, j=1\) is interpolated in the plan of \d+ tokens, not in",
    ),
    (
        UsesThePrompt,
        "uses_prompt",
        r"uses_prompt=True\) is not declared, but the plan depends on the prompt at query \d+",
    ),
    (KeepsState, "plans_do_not_depend_on_earlier_ones", "plans depend on the order in which they are made"),
    (ReportsLess, "range", r"max_relative reports 5, but query \d+ sees a key at relative distance 6"),
    (AttendsWhatACacheDrops, "retention", r"pair \(i=8, j=2\) is attended, but retention\(first=2, last=6\)"),
    (RetainedKeysMove, "retention", r"pair \(i=9, j=0\) is seen at 9, and pair \(i=8, j=0\) seen at 8: with retention"),
    (ScaleOfRetainedKeysGrows, "retention", r"query_scale is 1\.\d+ at query 7 and 1 at query 6"),
    (ForgetsInDescribe, "describe_builds_it_again", r"describe\(\) builds ForgetsInDescribe\(window=\d+\)"),
    (AcceptsAnything, "unknown_parameters_are_refused", "an unknown parameter is accepted"),
    (TouchesFrequencies, "frequencies", r"returns other frequencies, but .*changes_frequencies=True\) is not declared"),
    (StartsFromTheta, "frequencies", r"drops the model's own scaling"),
    (ColumnsUndeclared, "positions_per_frequency", r"segment 'middle' has positions with columns.*per_frequency=True"),
    (ColumnsPerHead, "positions_per_frequency", r"query_positions have 16 columns, and the model has 4 rotary frequ"),
    (DropsTheAttentionFactor, "frequencies", r"drops the model's own scaling"),
]
OTHER_SETTINGS = {ForgetsInDescribe: ({"near": 3},)}


ONCE: dict[str, Any] = {"derandomize": True, "database": None, "phases": [hypothesis.Phase.generate]}


def strategy_tests(strategy: type[Good]) -> StrategyContract:
    contract = type("TestMutant", (StrategyContract,), {"strategy": strategy})()
    contract.settings = hypothesis.settings(StrategyContract.settings, **ONCE)
    contract.params = OTHER_SETTINGS.get(strategy, ({},))
    return contract


@pytest.mark.parametrize(("mutant", "check", "says"), MUTANTS, ids=[m.__name__ for m, _, _ in MUTANTS])
def test_a_mutant_of_a_good_strategy_is_caught(mutant: type[Good], check: str, says: str) -> None:
    with pytest.raises(ContractViolation, match=says) as caught:
        getattr(strategy_tests(mutant), f"test_{check}")()
    assert str(caught.value).startswith(f"{mutant.__name__}(")


class TestTheGoodStrategy(StrategyContract):
    strategy = Good
    params = ({}, {"near": 1})


def test_lengths_that_never_reach_the_strategy_are_rejected() -> None:
    contract = strategy_tests(Good)
    contract.params = ({"near": 500},)
    with pytest.raises(ContractViolation, match=r"max_prompt=150 tokens gets the identity plan, so nothing was tested"):
        contract.test_lengths_reach_what_the_strategy_does()
