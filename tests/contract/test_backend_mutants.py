"""Copies of a good backend with one mistake each: the contract names every mistake."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor

import posenc
from posenc import PositionPlan, Rotary
from posenc.kernels.reference import ReferenceBackend
from posenc.testing import BackendContract, ContractViolation

Result = tuple[Tensor, Tensor]


class GoodBackend(ReferenceBackend):
    """The reference backend, in which a mutant can change any argument of ``attend``."""

    name = "mutant"
    mistake: ClassVar[Callable[..., dict[str, Any]]] = staticmethod(lambda **call: call)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: PositionPlan, rotary: Rotary, **rest: Any) -> Result:
        call = self.mistake(q=q, k=k, v=v, plan=plan, rotary=rotary, **rest)
        q, k, v, plan, rotary = (call.pop(key) for key in ("q", "k", "v", "plan", "rotary"))
        return self.finish(*ReferenceBackend().attend(q, k, v, plan, rotary, **call))

    def finish(self, out: Tensor, lse: Tensor) -> Result:
        return out, lse


def backend(**members: Any) -> posenc.AttentionBackend:
    mutant: type[GoodBackend] = type("Mutant", (GoodBackend,), members)
    return mutant()


def mistaken(**changes: Callable[..., Any]) -> posenc.AttentionBackend:
    """Return a backend that computes some arguments wrongly."""

    def mistake(**call: Any) -> dict[str, Any]:
        return {**call, **{key: change(**call) for key, change in changes.items()}}

    return backend(mistake=staticmethod(mistake))


def mistaken_in(dtype: torch.dtype, **changes: Callable[..., Any]) -> posenc.AttentionBackend:
    """Return such a backend that supports one dtype."""
    mutant = mistaken(**changes)
    type(mutant).capabilities = replace(ReferenceBackend.capabilities, dtypes=(dtype,))
    return mutant


def drop_a_key(plan: PositionPlan, **call: Any) -> PositionPlan:
    """Drop the last key of the first segment, like an interval that ends one key too early."""
    first, *rest = plan.segments
    longest = first.key_stop - first.key_start >= 2
    return replace(plan, segments=(replace(first, key_stop=first.key_stop - longest), *rest))


def first_rows_of_the_plan(plan: PositionPlan, q: Tensor, **call: Any) -> PositionPlan:
    """Treat the queries as the first ones of the plan: top-left alignment."""
    shift = plan.total - q.shape[2]
    segments = tuple(
        replace(s, key_start=np.roll(s.key_start, shift), key_stop=np.roll(s.key_stop, shift)) for s in plan.segments
    )
    return replace(plan, segments=segments)


def interpolate_positions(plan: PositionPlan, **call: Any) -> PositionPlan:
    """Rotate fractional positions by the fraction, ignoring the interpolation of the segment."""
    return replace(plan, segments=tuple(replace(s, interpolation="positions") for s in plan.segments))


def capabilities(**changes: Any) -> posenc.BackendCapabilities:
    return replace(ReferenceBackend.capabilities, **changes)


def as_if_contiguous(x: Tensor) -> Tensor:
    """Return what a kernel reads if it assumes that a tensor is contiguous."""
    room = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    memory = x.detach().as_strided((room,), (1,))
    return memory[torch.arange(x.numel()) % room].view(x.shape)


class GradientAsIfContiguous(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return as_if_contiguous(grads[0])


def leak_nan(out: Tensor, lse: Tensor) -> Result:
    return out + 0 * out.sum(0, keepdim=True), lse


def attend_rows_by_the_first_plan(self: posenc.AttentionBackend, *arguments: Any, **rest: Any) -> Result:
    q, k, v, plans, rotary = arguments
    return ReferenceBackend.attend_rows(self, q, k, v, [plans[0]] * len(plans), rotary, **rest)


BACKEND_MUTANTS: dict[str, tuple[posenc.AttentionBackend, str, str]] = {
    "one plan for all rows": (
        backend(attend_rows=attend_rows_by_the_first_plan),
        "a_plan_for_every_row",
        "mutant with plans per row, row 1: the output differs",
    ),
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
        mistaken(plan=lambda plan, **_: replace(plan, query_scale=None)),
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
    "softcap ignored": (
        mistaken(softcap=lambda **_: None),
        "matches_the_definition",
        "It is what it would be if softcap were ignored",
    ),
    "logit interpolation ignored": (
        mistaken(plan=interpolate_positions),
        "matches_the_definition",
        "It is what it would be if positions were interpolated, not logits",
    ),
    "lse carries no gradient": (
        backend(finish=lambda self, out, lse: (out, lse.detach())),
        "gradients",
        r"the gradient of [qk] is off by",
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
    "strides of the values ignored": (
        mistaken(v=lambda v, **_: as_if_contiguous(v)),
        "layouts",
        r"mutant with q .*, k .*, v .*: the output differs from the definition",
    ),
    "strides of the incoming gradient ignored": (
        backend(finish=lambda self, out, lse: (GradientAsIfContiguous.apply(out), lse)),
        "layouts",
        r"mutant with q .*, k .*, v .*: the gradient of q is off by",
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
        mistaken(plan=lambda plan, **_: replace(plan, segments=plan.segments[:-1] or plan.segments)),
        "registered_strategies",
        "mutant on 'lampe': .* if segment 'tail' were left out",
    ),
    "gradients not exact in bfloat16": (
        mistaken_in(torch.bfloat16, v=lambda v, **_: v.detach() + 0.5 * (v - v.detach())),
        "gradients",
        r"the gradient of v is off by .*bfloat16",
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


ONCE: dict[str, Any] = {"derandomize": True, "database": None, "phases": [hypothesis.Phase.generate]}


def backend_tests(under_test: posenc.AttentionBackend) -> BackendContract:
    contract = type("TestMutant", (BackendContract,), {"backend": under_test})()
    contract.settings = hypothesis.settings(BackendContract.settings, **ONCE)
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


class TestABackendWithoutGradientsOfItsLogsumexp(BackendContract):
    backend = backend(
        capabilities=capabilities(dtypes=(torch.float32,), lse_gradients=False),
        finish=lambda self, out, lse: (out, lse.detach()),
    )


class TestABackendOfFewCapabilities(BackendContract):
    backend = backend(
        capabilities=capabilities(
            devices=("cpu",), dtypes=(torch.float32,), gradients=False, masks=False, logit_interpolation=False
        )
    )
