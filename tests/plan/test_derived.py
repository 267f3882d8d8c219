"""Values derived from an object and kept on it: computed once, bounded, never taken for one another."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import posenc
from posenc.derived import MOST
from posenc.planning.memory import held_bytes

calls: list[int] = []


@pytest.fixture(autouse=True)
def no_calls() -> Iterator[None]:
    yield
    calls.clear()


def nothing(plan: posenc.PositionPlan, number: int) -> None:
    calls.append(number)


def doubled(plan: posenc.PositionPlan, number: int) -> int:
    return 2 * number * plan.total


def first_query_angle(rotary: posenc.Rotary) -> torch.Tensor:
    calls.append(0)
    return rotary.inv_freq[:1] * 1.0


def ones(plan: posenc.PositionPlan, count: int) -> np.ndarray:
    return np.ones(count)


def test_a_value_is_made_once_and_the_oldest_are_dropped() -> None:
    plan = posenc.strategy("rope").plan(5)
    for number in range(3 * MOST):
        for _ in range(2):
            plan.derived(nothing, number)  # the value may be None
        assert len(plan._derived) == min(number + 1, MOST)
    assert calls == list(range(3 * MOST))
    plan.derived(nothing, 2 * MOST)
    plan.derived(nothing, 2 * MOST - 1)
    assert calls == [*range(3 * MOST), 2 * MOST - 1]


def test_functions_with_equal_arguments_have_values_of_their_own() -> None:
    plan = posenc.strategy("rope").plan(5)
    plan.derived(nothing, 3)
    assert plan.derived(doubled, 3) == 30
    assert posenc.strategy("rope").plan(6).derived(doubled, 3) == 36


def test_no_copy_shares_what_is_derived() -> None:
    plan = posenc.strategy("self_extend", window=32).plan(40)
    segment, rotary = plan.segments[0], posenc.Rotary.from_theta(1e4, 16)
    for own in (plan, segment, rotary):
        own.derived(id)
        for other in (replace(own), copy.copy(own), copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
            assert other._derived == {}
            other.derived(hash)
        assert len(own._derived) == 1
    for part in (plan.prefix(20), plan.suffix(3), plan.clipped(9)):
        assert part._derived == {}


def test_frequencies_that_change_in_place_are_another_key() -> None:
    rotary = posenc.Rotary.from_theta(1e4, 16)
    before = rotary.derived(first_query_angle)
    assert rotary.derived(first_query_angle) is before
    rotary.inv_freq.mul_(0.5)
    assert rotary.derived(first_query_angle) == before / 2
    assert len(calls) == 2


def test_tensors_are_ordinary_whatever_the_mode_of_the_first_use() -> None:
    rotary = posenc.Rotary.from_theta(1e4, 16)
    rotary.inv_freq.requires_grad_()
    with torch.inference_mode():
        value = rotary.derived(first_query_angle)
    assert not value.is_inference()
    assert not value.requires_grad


def test_the_memory_of_a_plan_counts_what_is_derived() -> None:
    plan = posenc.strategy("rope").plan(5)
    before = held_bytes(plan)
    plan.derived(ones, 100)
    assert held_bytes(plan) == before + 800
