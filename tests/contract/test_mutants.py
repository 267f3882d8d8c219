"""A good strategy and a good backend with one mistake each: the contract names every one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import hypothesis
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor

import posenc
from posenc import Capabilities, Lengths, PositionPlan, Rotary, Segment
from posenc.kernels.reference import ReferenceBackend
from posenc.testing import BackendContract, ContractViolation, StrategyContract


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
        return head, replace(middle, key_start=np.minimum(1, np.maximum(middle.key_stop, 0)), memo={})


class BoundOffByOne(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return replace(head, key_stop=head.key_stop + 1, memo={}), middle


class BoundDecreases(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        cut = np.where(lengths.indices % 20 == 19, middle.key_stop - 3, middle.key_stop)
        return replace(head, key_start=np.maximum(cut, 0), memo={}), replace(middle, key_stop=cut, memo={})


class NotFinite(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, key_positions=np.where(lengths.indices == 4, np.nan, 0.0), memo={})


class DropsItself(Good):
    capabilities = Capabilities(drops_keys=True)

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        return (Segment.band("head", lengths.total, 1, None, lengths.indices, lengths.indices),)


class DecodesDifferently(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, query_positions=middle.query_positions + lengths.total / 1000, memo={})


class FirstStepDiffers(Good):
    """As published code does it: the last query is treated on its own."""

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        query = middle.query_positions.copy()
        query[-1] += lengths.total > 2 * self.near
        return head, replace(middle, query_positions=query, memo={})


class LeavesTheWindow(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        index = lengths.indices // 3
        return head, replace(middle, query_positions=index + self.near, key_positions=index, memo={})


class NotMonotone(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, query_positions=middle.query_positions - 2, memo={})


class SeesAhead(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, query_positions=middle.query_positions * 0 - 1, memo={})


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


class UsesThePrompt(Good):
    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        head, middle = super().segments(lengths)
        return head, replace(middle, query_positions=middle.query_positions + lengths.prompt / 500, memo={})


class KeepsState(Good):
    seen = 0

    def segments(self, lengths: Lengths) -> Sequence[Segment]:
        self.seen = max(self.seen, lengths.total)
        head, middle = super().segments(lengths)
        return head, replace(middle, query_positions=middle.query_positions + self.seen / 1000, memo={})


class ReportsLess(Good):
    def plan(self, prompt: int, total: int | None = None) -> PositionPlan:
        class Modest(PositionPlan):
            @property
            def max_relative(self) -> float:
                return min(super().max_relative, 5.0)

        plan = super().plan(prompt, total)
        return Modest(plan.prompt, plan.total, plan.segments, plan.query_scale, plan.window, plan.strategy)


class ForgetsInDescribe(Good):
    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


class AcceptsAnything(Good):
    def __init__(self, *, window: int | None = None, near: int = 6, active_from: int = 0, **ignored: Any) -> None:
        super().__init__(window=window, near=near, active_from=active_from)


class TouchesFrequencies(Good):
    def rotary(self, base: Rotary, prompt: int) -> Rotary:
        return base.with_frequencies(base.inv_freq / 2, 1.0) if prompt > 100 else base


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
    (ActiveFromIgnored, "active_from", r"active_from is \d+, but query_scale is 1\.\d+ at query 6"),
    (
        UsesThePrompt,
        "uses_prompt",
        r"uses_prompt=True\) is not declared, but the plan depends on the prompt at query \d+",
    ),
    (KeepsState, "plans_do_not_depend_on_earlier_ones", "plans depend on the order they are asked for"),
    (ReportsLess, "range", r"max_relative reports 5, but query \d+ sees a key at relative distance 6"),
    (ForgetsInDescribe, "describe_builds_it_again", r"describe\(\) builds ForgetsInDescribe\(window=\d+\)"),
    (AcceptsAnything, "unknown_parameters_are_refused", "an unknown parameter is accepted"),
    (TouchesFrequencies, "frequencies", r"returns other frequencies, but .*changes_frequencies=True\) is not declared"),
]
OTHER_SETTINGS = {ForgetsInDescribe: ({"near": 3},)}


def strategy_tests(strategy: type[Good]) -> StrategyContract:
    contract = type("TestMutant", (StrategyContract,), {"strategy": strategy})()
    contract.settings = hypothesis.settings(StrategyContract.settings, derandomize=True, database=None)
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


def test_lengths_that_never_reach_the_strategy_are_no_test() -> None:
    contract = strategy_tests(Good)
    contract.params = ({"near": 500},)
    with pytest.raises(ContractViolation, match=r"max_prompt=150 tokens gets the identity plan, so nothing was tested"):
        contract.test_lengths_reach_what_the_strategy_does()


Result = tuple[Tensor, Tensor]


class GoodBackend(ReferenceBackend):
    """The reference, with every argument of ``attend`` open to a mistake."""

    name = "mutant"
    mistake: ClassVar[Callable[..., dict[str, Any]]] = staticmethod(lambda **call: call)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: PositionPlan, rotary: Rotary, **rest: Any) -> Result:
        call = self.mistake(q=q, k=k, v=v, plan=plan, rotary=rotary, **rest)
        q, k, v, plan, rotary = (call.pop(key) for key in ("q", "k", "v", "plan", "rotary"))
        return self.finish(*super().attend(q, k, v, plan, rotary, **call))

    def finish(self, out: Tensor, lse: Tensor) -> Result:
        return out, lse


def backend(**members: Any) -> posenc.AttentionBackend:
    made: type[GoodBackend] = type("Mutant", (GoodBackend,), members)
    return made()


def mistaken(**changes: Callable[..., Any]) -> posenc.AttentionBackend:
    """A backend that computes some arguments wrongly."""

    def mistake(**call: Any) -> dict[str, Any]:
        return {**call, **{key: change(**call) for key, change in changes.items()}}

    return backend(mistake=staticmethod(mistake))


def drop_a_key(plan: PositionPlan, **call: Any) -> PositionPlan:
    """The last key of the first segment, as an interval that ends one too early does."""
    first, *rest = plan.segments
    longest = first.key_stop - first.key_start >= 2
    return replace(plan, segments=(replace(first, key_stop=first.key_stop - longest, memo={}), *rest), memo={})


def first_rows_of_the_plan(plan: PositionPlan, q: Tensor, **call: Any) -> PositionPlan:
    """Queries taken for the first ones: top-left alignment."""
    shift = plan.total - q.shape[2]
    segments = tuple(
        replace(s, key_start=np.roll(s.key_start, shift), key_stop=np.roll(s.key_stop, shift), memo={})
        for s in plan.segments
    )
    return replace(plan, segments=segments, memo={})


def capabilities(**changes: Any) -> posenc.BackendCapabilities:
    return replace(ReferenceBackend.capabilities, **changes)


def leak_nan(out: Tensor, lse: Tensor) -> Result:
    return out + 0 * out.sum(0, keepdim=True), lse


BACKEND_MUTANTS: dict[str, tuple[posenc.AttentionBackend, str, str]] = {
    "lse wrong": (
        backend(finish=lambda self, out, lse: (out, lse / np.log(2))),
        "matches_the_definition",
        r"the logsumexp differs .* at batch 0, head 0, query i=\d+ .*The output is right",
    ),
    "lse in the input dtype": (
        backend(finish=lambda self, out, lse: (out, lse.to(out.dtype))),
        "matches_the_definition",
        r"the logsumexp is torch.float64 .* should be torch.float32",
    ),
    "query_scale forgotten": (
        mistaken(plan=lambda plan, **_: replace(plan, query_scale=None, memo={})),
        "matches_the_definition",
        "It is what it would be if query_scale were forgotten",
    ),
    "attention_scaling forgotten": (
        mistaken(rotary=lambda rotary, **_: replace(rotary, attention_scaling=1.0)),
        "matches_the_definition",
        "It is what it would be if attention_scaling were forgotten",
    ),
    "scale ignored": (
        mistaken(scale=lambda q, **_: q.shape[-1] ** -0.5),
        "matches_the_definition",
        r"It is what it would be if scale were head_dim \*\* -0.5",
    ),
    "mask ignored": (
        mistaken(mask=lambda **_: None),
        "matches_the_definition",
        "It is what it would be if the mask were ignored",
    ),
    "one key dropped": (
        mistaken(plan=drop_a_key),
        "matches_the_definition",
        r"It is what it would be if pair \(i=\d+, j=\d+\) were not attended",
    ),
    "top-left alignment": (
        mistaken(plan=first_rows_of_the_plan),
        "matches_the_definition",
        r"the (output|logsumexp) differs .*Lq=\d+, Lk=\d+",
    ),
    "grouped heads in the wrong order": (
        mistaken(
            k=lambda q, k, **_: k.repeat(1, q.shape[1] // k.shape[1], 1, 1),
            v=lambda q, v, **_: v.repeat(1, q.shape[1] // v.shape[1], 1, 1),
        ),
        "matches_the_definition",
        r"the (output|logsumexp) differs .*(4 query heads, 2|6 query heads, 2)",
    ),
    "a segment left out": (
        mistaken(plan=lambda plan, **_: replace(plan, segments=plan.segments[:-1] or plan.segments, memo={})),
        "registered_strategies",
        "mutant on 'lampe': .* if segment 'tail' were left out",
    ),
    "gradients not exact": (
        mistaken(k=lambda k, **_: k.detach() + 0.5 * (k - k.detach())),
        "gradients",
        r"the gradient of k is off by .* but gradients are declared as exact",
    ),
    "empty rows report 0": (
        backend(finish=lambda self, out, lse: (out, lse.masked_fill(lse == -torch.inf, 0.0))),
        "rows_that_attend_nothing",
        "no segment holds a key of query i=0, so its logsumexp must be -inf",
    ),
    "NaN crosses the batch": (
        backend(finish=lambda self, out, lse: leak_nan(out, lse)),
        "nan_stays_in_its_batch_row",
        "a NaN in batch row 0 changes the output of batch row 1",
    ),
    "NaN hidden": (
        backend(finish=lambda self, out, lse: (out.nan_to_num(), lse)),
        "nan_stays_in_its_batch_row",
        "a NaN in a key of batch row 0 is hidden",
    ),
    "writes into its input": (
        mistaken(q=lambda q, **_: q.mul_(1.5)),
        "inputs_are_left_alone",
        "attend writes into q",
    ),
    "accepts every dtype": (
        backend(capabilities=capabilities(dtypes=(torch.float32,)), refuses=lambda *_: None),
        "what_is_not_declared_is_refused",
        "inputs in torch.float64 is not declared|inputs in torch.float64 .*accepted",
    ),
    "accepts masks": (
        backend(capabilities=capabilities(masks=False, devices=("cpu", "meta")), refuses=lambda *_: None),
        "what_is_not_declared_is_refused",
        "a mask is not declared in its capabilities, but accepted",
    ),
    "accepts gradients": (
        backend(capabilities=capabilities(gradients=False, devices=("cpu", "meta")), refuses=lambda *_: None),
        "what_is_not_declared_is_refused",
        "inputs that require gradients is not declared in its capabilities, but accepted",
    ),
}


def backend_tests(under_test: posenc.AttentionBackend) -> BackendContract:
    contract = type("TestMutant", (BackendContract,), {"backend": under_test})()
    contract.settings = hypothesis.settings(BackendContract.settings, derandomize=True, database=None)
    return contract


@pytest.mark.parametrize("mutant", BACKEND_MUTANTS)
def test_a_mutant_of_a_good_backend_is_caught(mutant: str) -> None:
    under_test, check, says = BACKEND_MUTANTS[mutant]
    with pytest.raises(ContractViolation, match=re.compile(says, re.DOTALL)) as caught:
        getattr(backend_tests(under_test), f"test_{check}")()
    assert str(caught.value).startswith("mutant")
    assert "mutant" not in posenc.backends()


class TestTheGoodBackend(BackendContract):
    backend = GoodBackend()


class TestABackendOfFewCapabilities(BackendContract):
    backend = backend(
        capabilities=capabilities(devices=("cpu",), dtypes=(torch.float32,), gradients=False, masks=False)
    )
