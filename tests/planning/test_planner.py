"""The rules of how plans follow the lengths over time, without a model."""

from __future__ import annotations

from typing import Any

import pytest

import posenc
from posenc.hf.cache.record import _runs, cut_spans, join_spans, span_count
from posenc.planning.planner import Planner
from posenc.planning.schedule import Schedule

WINDOW = 64


def make_planner(name: str = "lampe", **params: Any) -> Planner:
    defaults = {"lampe": {"head": 8, "tail": 5, "mapping": 30}, "dynamic": {"factor": 4}}.get(name, {})
    return Planner(posenc.strategy(name, window=WINDOW, **{**defaults, **params}))


def decode(planner: Planner, schedule: Schedule, before: int, tokens: int) -> Schedule:
    for length in range(before, before + tokens):
        schedule = planner.extend(schedule, length, length + 1)
    return schedule


def test_a_turn_gets_a_new_plan_and_decoded_tokens_do_not() -> None:
    planner = make_planner()
    schedule = planner.extend(Schedule(), 0, 50)
    assert schedule.entries == ((1, 50),)
    assert decode(planner, schedule, 50, 5) == schedule
    turn = planner.extend(schedule, 55, 60)
    assert turn.entries == ((1, 50), (56, 60))
    assert turn.pieces(50, 60) == ((50, 55, 50), (55, 60, 60))
    assert [turn.prompt_at(n) for n in (1, 55, 56, 60, 99)] == [50, 50, 60, 60, 60]
    assert planner.extend(turn, 60, 60) == turn  # a row that received only padding


def test_one_token_is_never_a_turn() -> None:
    planner = make_planner()
    assert planner.extend(Schedule(), 0, 1).entries == ((1, 1),)
    assert decode(planner, planner.extend(Schedule(), 0, 1), 1, 20).entries == ((1, 1),)


@pytest.mark.parametrize("at", [50, 60])
def test_candidates_equal_decoding_one_by_one(at: int) -> None:
    # at 60 the candidates cross the window, where the identity plan of the short prompt is replaced
    for planner in (make_planner(), make_planner(replan=7), make_planner(replan="never"), make_planner("dynamic")):
        start = decode(planner, planner.extend(Schedule(), 0, 10), 10, at - 10)
        assert planner.extend(start, at, at + 9, candidates=8) == decode(planner, start, at, 9)
    planner = make_planner()
    first = planner.extend(Schedule(), 0, 59, candidates=9)
    assert first == decode(planner, planner.extend(Schedule(), 0, 50), 50, 9)


def test_a_new_plan_is_made_before_the_window_is_left() -> None:
    planner = make_planner()
    schedule = decode(planner, planner.extend(Schedule(), 0, 10), 10, 200)
    prompts = [prompt for _, prompt in schedule.entries]
    assert prompts[:2] == [10, WINDOW + 1]  # at 64 tokens the largest distance is 63, still inside
    assert all(start == prompt for start, prompt in schedule.entries[1:])
    for start, prompt in schedule.entries:
        assert planner.plan(prompt, max(start, prompt)).max_relative < WINDOW


def test_a_crop_forgets_what_came_after() -> None:
    planner = make_planner()
    schedule = decode(planner, planner.extend(Schedule(), 0, 10), 10, 60)
    assert len(schedule.entries) > 1
    back = planner.extend(schedule, 30, 31)
    assert back.entries == ((1, 10),)
    assert planner.extend(schedule, 0, 40).entries == ((1, 40),)


def test_strategies_that_gain_nothing_never_replan() -> None:
    for name in ("rope", "rerope", "self_extend", "dca"):
        planner = make_planner(name)
        assert decode(planner, planner.extend(Schedule(), 0, 10), 10, 300).entries == ((1, 10),)


def test_dynamic_frequencies_follow_the_length_past_the_window() -> None:
    planner = make_planner("dynamic")
    schedule = decode(planner, planner.extend(Schedule(), 0, 60), 60, 8)
    assert schedule.entries == ((1, 60), *((n, n) for n in range(WINDOW + 1, 69)))


@pytest.mark.parametrize("name", ["rerope", "lampe"])
def test_a_short_chat_leaves_the_identity_plan_before_the_window_ends(name: str) -> None:
    planner = Planner(posenc.strategy(name, window=WINDOW, active_from=WINDOW))
    schedule = decode(planner, planner.extend(Schedule(), 0, 10), 10, 2 * WINDOW)
    assert planner.plan(schedule.prompt_at(WINDOW), WINDOW).is_identity
    for length in range(WINDOW + 1, 2 * WINDOW):
        assert planner.plan(schedule.prompt_at(length), length).max_relative < WINDOW


def test_an_announced_prompt_length_is_used_for_all_chunks() -> None:
    planner = make_planner()
    schedule = planner.extend(Schedule(), 0, 40, announced=90)
    schedule = planner.extend(schedule, 40, 89, announced=90)
    schedule = planner.extend(schedule, 89, 90, announced=90)  # a last chunk of one token
    assert schedule.entries == ((1, 90),)
    assert planner.extend(schedule, 90, 91, announced=90) == schedule
    assert planner.plan(90, 40).total == 40
    assert planner.extend(Schedule(), 0, 95, announced=90, candidates=5) == planner.extend(
        Schedule(), 0, 95, candidates=5
    )
    with pytest.raises(posenc.InvalidInputError, match=r"90 tokens was announced.* makes it 95"):
        planner.extend(Schedule(), 0, 95, announced=90)


def test_spans_are_joined_and_cut() -> None:
    import torch

    assert _runs(torch.tensor([0, 1, 1, 0, 1]).bool()) == ((1, 3), (4, 5))
    assert _runs(torch.zeros(3).bool()) == ()
    assert join_spans(((1, 3),), ((3, 5), (7, 8))) == ((1, 5), (7, 8))
    assert join_spans((), ((3, 5),)) == ((3, 5),)
    assert cut_spans(((1, 3), (5, 9)), 2, 7) == ((0, 1), (3, 5))
    assert span_count(((1, 3), (5, 9)), below=6) == 3
