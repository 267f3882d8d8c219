"""Runs of new tokens that share a plan, compared with the definition, which takes one token after the other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import posenc
from posenc.planning.planner import Planner
from posenc.planning.schedule import Schedule

WINDOW = 64


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Schedules that can arise: a plan from the first token on, each later plan from a longer row on."""
    starts = sorted(draw(st.sets(st.integers(2, 30), max_size=6)))
    return Schedule(tuple((start, draw(st.integers(start, 60))) for start in (1, *starts)))


def prompt_of(schedule: Schedule, token: int) -> int:
    """The prompt of the newest entry at the time when the row became ``token + 1`` tokens long."""
    (*_, prompt) = (prompt for start, prompt in schedule.entries if start <= token + 1)
    return prompt


@given(schedule=schedules(), before=st.integers(0, 32), new=st.integers(1, 12))
def test_pieces_are_the_plans_of_the_single_tokens(schedule: Schedule, before: int, new: int) -> None:
    pieces = schedule.pieces(before, before + new)
    shared = [(token, prompt) for low, high, prompt in pieces for token in range(low, high)]
    assert shared == [(token, prompt_of(schedule, token)) for token in range(before, before + new)]
    assert len(pieces) == 1 + sum(before < start - 1 < before + new for start, _ in schedule.entries)


@given(rule=st.integers(1, 9), chunks=st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_chunks_of_decoded_tokens_use_the_same_plans_as_single_tokens(rule: int, chunks: list[int]) -> None:
    own = Planner(posenc.strategy("lampe", window=WINDOW, head=8, tail=5, mapping=30, replan=rule))
    at_once = single = own.extend(Schedule(), 0, 70)
    before, uses, expected = 70, [], []
    for new in chunks:
        at_once = own.extend(at_once, before, before + new, candidates=new - 1)
        uses += [prompt for low, high, prompt in at_once.pieces(before, before + new) for _ in range(low, high)]
        for length in range(before, before + new):
            single = own.extend(single, length, length + 1)
            ((low, high, prompt),) = single.pieces(length, length + 1)
            assert (low, high) == (length, length + 1)
            expected.append(prompt)
        before += new
    assert uses == expected == [70 + (length - 70) // rule * rule for length in range(71, before + 1)]
