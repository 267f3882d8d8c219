"""The canary's float64 rows equal the definition, and a kernel's mistakes at segment borders show in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import posenc
from posenc.bench import canary
from posenc.bench.cases import STRATEGIES, BenchCase
from posenc.bench.sampled import aim_queries, expected_rows, sampled_rows
from posenc.kernels.cpu.backend import CpuFlashBackend
from posenc.plan import PositionPlan
from posenc.segment import Segment
from posenc.testing.definition import attention_by_definition
from posenc.testing.generators import three_kinds_plan
from posenc.testing.tensors import installed, tensors

LONG, SCALE = 8192, 0.125
CHANGED = ("key_start", "key_stop", "query_positions")
ROTARY = posenc.Rotary.from_theta(1e4, 64)


def plan_of(name: str, length: int) -> PositionPlan:
    params = {"mapping": 3 * length // 16} if name == "lampe" else {}
    return posenc.strategy(name, window=length // 4, **params).plan(length)


@pytest.mark.parametrize("name", [*STRATEGIES, "three kinds"])
def test_sampled_rows_equal_the_definition(name: str):
    plan = three_kinds_plan(48) if name == "three kinds" else plan_of(name, 48)
    rotary = posenc.Rotary.from_theta(1e3, 8, style="interleaved", channels=(2, 10), attention_scaling=1.1)
    q, k, v = tensors(plan, 20, (4, 2), 12, batch=1)
    rows = np.array([28, 31, 40, 47])
    aim_queries(q, k, plan, rotary, rows, 0.3, 0)
    expected_out, expected_lse = attention_by_definition(q, k, v, plan, rotary, scale=0.3)
    out, lse = expected_rows(q, k, v, plan, rotary, rows, 0.3)
    torch.testing.assert_close(out, expected_out[0][:, rows - 28], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(lse, expected_lse[0][:, rows - 28], atol=1e-9, rtol=1e-9)


def moved(bound: str, by: int) -> Callable[[Segment], Segment]:
    """Return a mistake: one key more or less at one end of every query's interval."""

    def change(segment: Segment) -> Segment:
        start, stop = segment.key_start, segment.key_stop
        live = stop > start
        new = {"key_start": start, "key_stop": stop}
        new[bound] = np.where(live, np.clip(new[bound] + by, 0, len(start)), new[bound])
        return replace(segment, **new)

    return change


MISTAKES = {
    "a key before the first": moved("key_start", -1),
    "without the first key": moved("key_start", 1),
    "a key after the last": moved("key_stop", 1),
    "without the last key": moved("key_stop", -1),
    "queries a position on": lambda segment: replace(segment, query_positions=segment.query_positions + 1),
}


def as_a_kernel(plan: PositionPlan, *call: Any) -> list[tuple[Tensor, Tensor]]:
    """Compute every segment on its own: a key in two segments counts twice, as in a kernel."""
    q, k, v, rows = call
    parts = (
        expected_rows(q, k, v, replace(plan, segments=(segment,)), ROTARY, rows, SCALE) for segment in plan.segments
    )
    return [(out.nan_to_num(), lse) for out, lse in parts]


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge the outputs and logsumexps of all parts."""
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    return torch.stack([out * (part_lse - lse).exp()[..., None] for out, part_lse in parts]).sum(0), lse


@pytest.mark.parametrize("name", ["lampe", "dca"])
def test_a_mistake_at_the_border_of_any_segment_is_far_beyond_the_tolerance(name: str):
    plan = plan_of(name, LONG)
    assert len(plan.segments) > 1
    q, k, v = tensors(plan, LONG, (8, 2), 64, batch=1)
    rows = sampled_rows(plan, LONG, 24, seed=0)
    assert {0, LONG - 1} <= set(rows.tolist())
    aim_queries(q, k, plan, ROTARY, rows, SCALE, 0)
    parts = as_a_kernel(plan, q, k, v, rows)
    right = expected_rows(q, k, v, plan, ROTARY, rows, SCALE)
    torch.testing.assert_close(merged(parts), right)
    missed, tried = [], 0
    for what, mistake in MISTAKES.items():
        for number, segment in enumerate(plan.segments):
            wrong = mistake(segment)
            if all(np.array_equal(getattr(wrong, key)[rows], getattr(segment, key)[rows]) for key in CHANGED):
                continue  # there is nothing beyond that end
            tried += 1
            (part,) = as_a_kernel(replace(plan, segments=(wrong,)), q, k, v, rows)
            out, lse = merged([*parts[:number], part, *parts[number + 1 :]])
            off = float(((out - right[0]).abs() / right[0].square().mean(-1, keepdim=True).sqrt()).max())
            if off < 2 * canary.TOLERANCES["bfloat16"]:
                missed.append((what, segment.name, off, float((lse - right[1]).abs().max())))
    assert missed == []
    assert tried >= 4 * len(plan.segments)


def case(**changes: object) -> BenchCase:
    facts = {"kind": "attention", "shape": "8/2x64", "dtype": "bfloat16", "threads": 1, "length": 512, "window": 128}
    return BenchCase(**{**facts, "strategy": "lampe", "backend": "cpu_flash", **changes})  # type: ignore[arg-type]


def test_bfloat16_stays_well_within_the_tolerance():
    for kind, cache in (("attention", "rotated"), ("query", "rotated"), ("query", "raw")):
        verdict = canary.check(case(kind=kind, cache=cache))
        assert verdict.output < 0.6 * verdict.output_allowed
        assert verdict.lse < 0.6 * verdict.lse_allowed
        assert verdict.rows == (canary.STEPS if kind == "query" else canary.ROWS)


class OnePositionOff(CpuFlashBackend):
    name = "made_up"

    def attend(self, q, k, v, plan, rotary, **options):
        first, *rest = plan.segments
        shifted = replace(first, query_positions=first.query_positions + 1)
        return super().attend(q, k, v, replace(plan, segments=(shifted, *rest)), rotary, **options)


class PartlyUnwritten(CpuFlashBackend):
    """Leaves one block of the logsumexp, or of the output, unwritten."""

    name = "made_up"
    part = 0

    def attend(self, q, *rest, **options):
        result = list(super().attend(q, *rest, **options))
        right = result[self.part]
        result[self.part] = torch.empty_like(right)
        result[self.part][:, :, :-1] = right[:, :, :-1]
        return tuple(result)


class LogsumexpUnwritten(PartlyUnwritten):
    part = 1


@pytest.mark.parametrize("backend", [OnePositionOff, PartlyUnwritten, LogsumexpUnwritten])
@pytest.mark.parametrize("kind", ["attention", "query"])
def test_a_wrong_backend_is_caught(backend: type[CpuFlashBackend], kind: str):
    with installed(backend()) as name:
        assert not canary.check(case(kind=kind, backend=name, cache="raw" if kind == "query" else "rotated")).good


def test_poisoned_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    with canary.poisoned("cpu"):
        assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert torch.are_deterministic_algorithms_enabled() is before


def test_cases_cover_everything_that_is_timed():
    cases = canary.cases("cpu_flash", "cpu", (64, 256), "4/2x16", ("bfloat16", "float16"))
    assert {(c.kind, c.cache, c.strategy, c.length) for c in cases if c.dtype == "bfloat16"} == {
        (kind, cache, strategy, length)
        for kind, cache in (("attention", "rotated"), ("query", "raw"), ("query", "rotated"))
        for strategy in STRATEGIES
        for length in (64, 256)
    }
    assert {c.length for c in cases if c.dtype == "float16"} == {64}
    assert len(cases) == len(set(cases)) == 45
    keeps_none = canary.cases("reference", "cpu", (64,), "4/2x16", ("float32",))
    assert {c.cache for c in keeps_none if c.kind == "query"} == {"raw"}
