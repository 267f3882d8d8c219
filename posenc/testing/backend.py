"""The contract of a backend, as a class for pytest.

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from posenc.backend import AttentionBackend
from posenc.errors import BackendError, InvalidConfigError, PluginError
from posenc.kernels.dispatch import attention
from posenc.plan import PositionPlan
from posenc.plugins import backend_info, strategies
from posenc.positions import FrequencyStrategy
from posenc.rope import Rotary
from posenc.segment import Lengths, Segment
from posenc.testing.generators import banded_plan, interpolating_plan, three_kinds_plan
from posenc.testing.gradients import check_empty_row_gradients, check_gradients, weights_of
from posenc.testing.layouts import LAYOUTS
from posenc.testing.tensors import AttentionCall, check_empty_rows, check_result, installed, random_calls, tensors
from posenc.testing.violation import violated

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class BackendContract:
    """Inherit from this in a test module and set :attr:`backend`; every check is one test.

    All calls go through :func:`posenc.attention`, so ``refuses`` is tested together with ``attend``. Declared devices
    that are not present are skipped.

    Examples
    --------
    >>> class TestMine(posenc.testing.BackendContract):
    ...     backend = MyBackend()
    """

    backend: ClassVar[AttentionBackend]
    """The backend; it need not be registered."""

    head_dim: ClassVar[int] = 8
    """Channels of a head; a multiple of 4."""

    max_total: ClassVar[int] = 70
    """Most tokens of a random plan."""

    tolerances: ClassVar[Mapping[torch.dtype, float]] = {
        torch.float64: 1e-9,
        torch.float32: 2e-5,
        torch.bfloat16: 8e-2,
        torch.float16: 1e-2,
    }
    """Largest difference from the float64 definition, by dtype; at least 2e-5 for the logsumexp, which is float32."""

    gradient_tolerances: ClassVar[Mapping[torch.dtype, float]] = {
        torch.float64: 1e-8,
        torch.float32: 2e-5,
        torch.bfloat16: 5e-2,
        torch.float16: 6e-3,
    }
    """Largest difference of a gradient, relative to its largest value if that is above 1."""

    settings: ClassVar[hypothesis.settings] = hypothesis.settings(
        max_examples=40,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    """Settings of hypothesis, such as how many cases each check draws."""

    def test_it_can_be_registered(self) -> None:
        """It is an AttentionBackend with a name, a summary and capabilities."""
        try:
            info = backend_info(self.backend, "the distribution under test")
        except (PluginError, AttributeError) as error:
            violated(str(error))
        if not (info.name and info.summary):
            violated(f"{type(self.backend).__name__}: name and summary must not be empty.")

    def test_matches_the_definition(self) -> None:
        """Results are right for random plans, heads, lengths, rotations and masks, in every declared dtype."""
        for device, dtype in self._declared():

            @self.settings
            @hypothesis.given(call=self._calls(dtype, device))
            def example(call: AttentionCall) -> None:
                with installed(self.backend) as name:
                    check_result(name, call, *call.run(name), self.tolerances[call.q.dtype])

            example()

    def test_registered_strategies(self) -> None:
        """Results are right for the plans of every registered strategy, at a length where each of them acts."""
        device, dtype = self._plainest()
        rotary = Rotary.from_theta(1e4, self.head_dim)
        for info in strategies().values():
            if issubclass(info.factory, FrequencyStrategy):
                continue
            try:
                plan = info.factory(window=64).plan(140, 150)
            except InvalidConfigError:  # a parameter without a default
                continue
            if plan.interpolates_logits and not self.backend.capabilities.logit_interpolation:
                continue
            for q_len in (150, 77, 1):
                q, k, v = tensors(plan, q_len, (2, 1), self.head_dim, batch=1, dtype=dtype, device=device)
                call = AttentionCall(q, k, v, plan, rotary, self.head_dim**-0.5)
                with installed(self.backend) as name:
                    check_result(f"{name} on {info.name!r}", call, *call.run(name), self.tolerances[dtype])

    def test_value_width(self) -> None:
        """Values of another width than the keys give a right result or are refused."""
        plan = banded_plan(60)
        for device, dtype in self._declared():
            q, k, v = tensors(plan, 60, (4, 2), 2 * self.head_dim, dtype=dtype, device=device)
            q, k = q[..., : self.head_dim], k[..., : self.head_dim]
            for width in (self.head_dim // 2, 2 * self.head_dim):
                call = AttentionCall(q, k, v[..., :width], plan, self._rotary(), self.head_dim**-0.5)
                with installed(self.backend) as name:
                    try:
                        result = call.run(name)
                    except BackendError:
                        continue
                    check_result(f"{name} with values of {width} channels", call, *result, self.tolerances[dtype])

    def test_gradients(self) -> None:
        """Declared gradients are exact; with ``lse_gradients`` also those through the logsumexp."""
        if not self.backend.capabilities.gradients:
            pytest.skip("gradients are not declared")
        for device, dtype in self._declared():

            @self.settings
            @hypothesis.given(call=self._calls(dtype, device, max_total=40))
            def example(call: AttentionCall) -> None:
                with installed(self.backend) as name:
                    self._check_gradients(name, name, call)

            example()

    def test_layouts(self) -> None:
        """The memory layout of the tensors changes neither results nor declared gradients."""
        names = st.sampled_from(sorted(LAYOUTS))
        masked = st.booleans() if self.backend.capabilities.masks else st.just(False)

        @self.settings
        @hypothesis.given(st.tuples(names, names, names, names), st.sampled_from([18, 1]), masked)
        def example(layouts: tuple[str, str, str, str], q_len: int, masked: bool) -> None:
            for device, dtype in self._declared():
                call = self._plain_call(three_kinds_plan(18), dtype, device)
                call = replace(call, q=call.q[:, :, -q_len:])
                if masked:
                    call = replace(call, mask=call.k[:, :1, :, :1].mT.expand(-1, -1, q_len, -1) > -1)
                self._check_layout(call, layouts)

        example()

    def test_scales_that_are_not_positive(self) -> None:
        """A scale of zero gives all keys the same weight; a negative scale equals negated queries."""
        for device, dtype in self._declared():
            for scale, q_len in ((0.0, 18), (-0.7, 18), (0.0, 1), (-0.7, 1)):
                call = replace(self._plain_call(three_kinds_plan(18), dtype, device), scale=scale)
                call = replace(call, q=call.q[:, :, -q_len:])
                with installed(self.backend) as name:
                    check_result(name, call, *call.run(name), self.tolerances[dtype])
                    self._check_gradients(name, name, call)

    def test_a_plan_for_every_row(self) -> None:
        """Each row of a batch with a plan per row gets the result that it gets alone."""
        plans = [three_kinds_plan(18), PositionPlan.identity(Lengths(18, 18)), banded_plan(18)]
        plans[1] = replace(plans[1], query_scale=1 + np.arange(18) / 18)
        device, dtype = self._plainest()
        for q_len in (18, 2):
            q, k, v = tensors(plans[0], q_len, (4, 2), self.head_dim, batch=3, dtype=dtype, device=device)
            mask = k[:, :1, :, :1].mT.expand(-1, -1, q_len, -1) > -1 if self.backend.capabilities.masks else None
            with installed(self.backend) as name:
                result = attention(q, k, v, plans, self._rotary(), backend=name, mask=mask, return_lse=True)
                assert isinstance(result, tuple)
                out, lse = result
                for row, plan in enumerate(plans):
                    at = slice(row, row + 1)
                    row_mask = None if mask is None else mask[at]
                    call = AttentionCall(q[at], k[at], v[at], plan, self._rotary(), self.head_dim**-0.5, row_mask)
                    what = f"{name} with plans per row, row {row}"
                    check_result(what, call, out[at], lse[at], self.tolerances[dtype])

    def test_an_empty_batch(self) -> None:
        """A batch without rows gives an empty result of the right shape and dtype."""
        for device, dtype in self._declared():
            call = self._plain_call(banded_plan(40), dtype, device)
            for q_len in (40, 1):
                empty = replace(call, q=call.q[:0, :, -q_len:], k=call.k[:0], v=call.v[:0])
                with installed(self.backend) as name:
                    check_result(name, empty, *empty.run(name), self.tolerances[dtype])

    def test_rows_that_attend_nothing(self) -> None:
        """A query that attends no key gets zeros and ``-inf``, and finite gradients."""
        index = np.arange(6)
        late = Segment("late", index * 0, np.maximum(index - 2, 0), index, index)  # no key for the first queries
        plan = PositionPlan.build(Lengths(6, 6), [late])
        for device, dtype in self._declared():
            self._check_empty_rows(self._plain_call(plan, dtype, device), slice(0, 3), "no segment holds a key of")
            if self.backend.capabilities.masks:
                call = self._plain_call(PositionPlan.identity(Lengths(6, 6)), dtype, device)
                mask = torch.ones(2, 1, 6, 6, dtype=torch.bool, device=device)
                mask[:, :, 2:4] = False
                self._check_empty_rows(replace(call, mask=mask), slice(2, 4), "the mask leaves nothing to")
                self._check_empty_rows(replace(call, mask=mask & False), slice(0, 6), "the mask leaves nothing to")

    def test_nan_stays_in_its_batch_row(self) -> None:
        """A NaN in one sequence of a batch appears in its output and in no other."""
        for device, dtype in self._declared():
            call = self._plain_call(banded_plan(40), dtype, device)
            bad = call.k.clone()
            bad[0, 0, 3] = math.nan
            with installed(self.backend) as name:
                clean, out = call.run(name)[0], replace(call, k=bad).run(name)[0]
            if not bool(out[0].isnan().any()):
                violated(f"{name}: a NaN in a key of batch row 0 is hidden in its output. Case: {call}.")
            if not torch.equal(out[1], clean[1]):
                violated(f"{name}: a NaN in batch row 0 changes the output of batch row 1. Case: {call}.")

    def test_inputs_are_left_alone(self) -> None:
        """Query, key, value and mask are not written to."""
        for device, dtype in self._declared():
            call = self._plain_call(banded_plan(40), dtype, device)
            if self.backend.capabilities.masks:
                call = replace(call, mask=torch.ones(2, 1, 40, 40, dtype=torch.bool, device=device).tril(-1))
            names = [x for x in ("q", "k", "v", "mask") if getattr(call, x) is not None]
            before = {x: getattr(call, x).clone() for x in names}
            with installed(self.backend) as name:
                call.run(name)
            for x in names:
                if not torch.equal(getattr(call, x), before[x]):
                    violated(f"{name}: attend writes into {x}. Case: {call}.")

    def test_what_is_not_declared_is_refused(self) -> None:
        """Undeclared dtypes, devices, masks, softcaps, interpolations and gradients raise BackendError.

        So does a logsumexp whose gradient is not declared, if query or key require gradients.
        """
        able, (device, dtype) = self.backend.capabilities, self._declared()[0]
        call = self._plain_call(banded_plan(9), dtype, device)
        cases = {
            f"inputs in {other}": self._plain_call(banded_plan(9), other, device)
            for other in DTYPES
            if other not in able.dtypes
        }
        if "meta" not in able.devices:
            cases["tensors on the device 'meta'"] = replace(
                call, q=call.q.to("meta"), k=call.k.to("meta"), v=call.v.to("meta")
            )
        if not able.masks:
            cases["a mask"] = replace(call, mask=torch.ones(2, 1, 9, 9, dtype=torch.bool, device=device))
        if not able.softcap:
            cases["a softcap"] = replace(call, softcap=30.0)
        if not able.logit_interpolation:
            cases["a segment with interpolation='logits'"] = self._plain_call(interpolating_plan(9), dtype, device)
        if not able.gradients:
            cases["inputs that require gradients"] = replace(call, v=call.v.clone().requires_grad_())
        elif not able.lse_gradients:
            cases["the gradient of a logsumexp"] = replace(call, k=call.k.clone().requires_grad_())
        with installed(self.backend) as name:
            for what, refused in cases.items():
                try:
                    refused.run(name)
                except BackendError:
                    continue
                except Exception as error:
                    violated(f"{name}: {what} raises {type(error).__name__}, not BackendError: {error}")
                violated(f"{name}: {what} is not declared in its capabilities, but accepted.")
            if not able.gradients:
                with torch.no_grad():
                    cases["inputs that require gradients"].run(name)

    def _check_empty_rows(self, call: AttentionCall, rows: slice, why: str) -> None:
        tolerance = self.tolerances[call.q.dtype]
        with installed(self.backend) as name:
            check_empty_rows(name, call, rows, why)
            check_result(name, call, *call.run(name), tolerance)
            if self.backend.capabilities.gradients:
                check_empty_row_gradients(name, call)

    def _check_layout(self, call: AttentionCall, layouts: tuple[str, str, str, str]) -> None:
        """Check a call with these layouts of query, key, value, and mask and incoming gradient."""
        *of_inputs, of_mask = (LAYOUTS[layout] for layout in layouts)
        q, k, v = (laid_out(x) for laid_out, x in zip(of_inputs, (call.q, call.k, call.v), strict=True))
        call = replace(call, q=q, k=k, v=v, mask=None if call.mask is None else of_mask(call.mask))
        with installed(self.backend) as name:
            what = f"{name} with {', '.join(f'{x} {how}' for x, how in zip('qkv', layouts, strict=False))}"
            check_result(what, call, *call.run(name), self.tolerances[call.q.dtype])
            self._check_gradients(what, name, call, grad_out=of_mask(weights_of(call)))

    def _check_gradients(self, what: str, name: str, call: AttentionCall, grad_out: torch.Tensor | None = None) -> None:
        able, tolerance = self.backend.capabilities, self.gradient_tolerances[call.q.dtype]
        if able.gradients:
            check_gradients(what, name, call, tolerance, lse=able.lse_gradients, grad_out=grad_out)

    def _rotary(self) -> Rotary:
        return Rotary.from_theta(1e3, self.head_dim)

    def _plain_call(self, plan: PositionPlan, dtype: torch.dtype, device: str) -> AttentionCall:
        q, k, v = tensors(plan, plan.total, (4, 2), self.head_dim, dtype=dtype, device=device)
        return AttentionCall(q, k, v, plan, self._rotary(), self.head_dim**-0.5)

    def _calls(self, dtype: torch.dtype, device: str, max_total: int | None = None) -> SearchStrategy[AttentionCall]:
        return random_calls(
            dim=self.head_dim,
            able=self.backend.capabilities,
            dtype=dtype,
            device=device,
            max_total=min(max_total or self.max_total, self.max_total),
        )

    def _plainest(self) -> tuple[str, torch.dtype]:
        """A device with float32, or the first declared pair of device and dtype."""
        declared = self._declared()
        return next((pair for pair in declared if pair[1] == torch.float32), declared[0])

    def _declared(self) -> list[tuple[str, torch.dtype]]:
        """Pairs of a declared device that is present and a declared dtype, the most precise first."""
        able = self.backend.capabilities
        present = [device for device in able.devices if device != "cuda" or torch.cuda.is_available()]
        pairs = [(device, dtype) for device in present for dtype in DTYPES if dtype in able.dtypes]
        if not pairs:
            pytest.skip(f"none of the declared devices is present: {', '.join(able.devices)}")
        return pairs
