"""Rows of a batch that share a layout and their plans, and the tokens of theirs that a layer computes.

Shape letters: B batch, R rows of a group, H heads, L new tokens, K cache slots, C tokens of a group, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posenc.hf.cache.record import Row, Spans, span_count
from posenc.plan import PositionPlan
from posenc.rope import Rotary


@dataclass(frozen=True)
class RowGroup:
    """Rows with the same layout of real tokens and the same plans.

    Parameters
    ----------
    rows : tuple of int
        Rows of the batch, ascending.
    spans : Spans
        Slots of their real tokens.
    before : int
        Real tokens that were in the cache before the forward.
    runs : tuple of (int, int, int)
        ``(from, to, prompt)``: new tokens that share a plan, counted in real tokens.
    consecutive : bool
        Whether their position ids count up by one.
    """

    rows: tuple[int, ...]
    spans: Spans
    before: int
    runs: tuple[tuple[int, int, int], ...]
    consecutive: bool

    def select(self, x_BHLD: Tensor) -> Tensor:
        """The group's rows of a batched tensor; neighbouring rows are a view."""
        if len(self.rows) == len(x_BHLD):  # the rows of a group are in order
            return x_BHLD
        first, last = self.rows[0], self.rows[-1]
        if last - first + 1 == len(self.rows):
            return x_BHLD[first : last + 1]
        return x_BHLD[list(self.rows)]


@dataclass(frozen=True)
class QueryRun:
    """New tokens ``low .. high - 1`` of a group that share a plan and frequencies, and how many keys they see."""

    low: int
    high: int
    keys: int
    plan: PositionPlan
    rotary: Rotary


@dataclass(frozen=True)
class GroupWork:
    """What a group asks of the layers of one kind: the slots of its new tokens and of its keys, and its plans."""

    group: RowGroup
    new: Spans
    keys: Spans
    runs: tuple[QueryRun, ...]


def grouped(rows: Sequence[Row], past: int) -> list[RowGroup]:
    """The rows of a forward on ``past`` slots, grouped; rows without new real tokens are left out."""
    groups: dict[tuple[Spans, int, tuple[tuple[int, int, int], ...], bool], list[int]] = {}
    for index, row in enumerate(rows):
        before = span_count(row.spans, below=past)
        if row.length > before:
            runs = row.schedule.pieces(before, row.length)
            groups.setdefault((row.spans, before, runs, row.consecutive), []).append(index)
    return [RowGroup(tuple(members), *key) for key, members in groups.items()]


def tokens(x_BHLD: Tensor, start: int, stop: int) -> Tensor:
    """Tokens ``start .. stop - 1``; the tensor itself where that is all of them."""
    return x_BHLD if stop - start == x_BHLD.shape[2] else x_BHLD[:, :, start:stop]


def gather(x_BHLD: Tensor, spans: Spans) -> Tensor:
    """The tokens of the spans; one span is a view."""
    if len(spans) == 1:
        return tokens(x_BHLD, *spans[0])
    return torch.cat([x_BHLD[:, :, start:stop] for start, stop in spans], dim=2)


def scatter(out_BHLD: Tensor, part_RHCD: Tensor, rows: tuple[int, ...], spans: Spans) -> None:
    """Put a group's outputs at its rows and new tokens."""
    done = 0
    for start, stop in spans:
        for number, row in enumerate(rows):
            out_BHLD[row, :, start:stop] = part_RHCD[number, :, done : done + stop - start]
        done += stop - start
