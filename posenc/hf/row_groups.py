"""Group the rows of a batch that share padding and plans, and select the tokens that a layer computes for each group.

A :class:`~posenc.hf.step.Step` groups its rows once per forward, and every layer runs one attention call per group and
plan.

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
    """Rows with real tokens in the same slots and with the same plans.

    Parameters
    ----------
    rows : tuple of int
        Rows of the batch, ascending.
    spans : Spans
        Slots of their real tokens.
    before : int
        Real tokens of each row that were in the cache before the forward.
    runs : tuple of (int, int, int)
        ``(from, to, prompt)``: new tokens that share the plan for ``prompt`` tokens, counted in the row's real tokens.
    consecutive : bool
        Whether the position ids of each row count up by one.
    """

    rows: tuple[int, ...]
    spans: Spans
    before: int
    runs: tuple[tuple[int, int, int], ...]
    consecutive: bool

    def select(self, x_BHLD: Tensor) -> Tensor:
        """Return the group's rows of a batched tensor, as a view if they are neighbours."""
        if len(self.rows) == len(x_BHLD):  # the rows of a group are ascending
            return x_BHLD
        first, last = self.rows[0], self.rows[-1]
        if last - first + 1 == len(self.rows):
            return x_BHLD[first : last + 1]
        return x_BHLD[list(self.rows)]


@dataclass(frozen=True)
class QueryRun:
    """New tokens of a group that share a plan and frequencies.

    Parameters
    ----------
    low, high : int
        The tokens ``low .. high - 1``, counted from the group's first new token.
    keys : int
        How many of the keys that the layer holds come before or at the last of these tokens.
    plan : PositionPlan
        Their plan.
    rotary : Rotary
        Their frequencies, in the layer's layout.
    """

    low: int
    high: int
    keys: int
    plan: PositionPlan
    rotary: Rotary


@dataclass(frozen=True)
class GroupWork:
    """What the layers of one kind compute for a group.

    Parameters
    ----------
    group : RowGroup
        The rows.
    new : Spans
        Slots of their new tokens, counted from the first new slot.
    keys : Spans
        Slots of their keys, counted from the first slot that the layer holds.
    runs : tuple of QueryRun
        Their new tokens by plan.
    """

    group: RowGroup
    new: Spans
    keys: Spans
    runs: tuple[QueryRun, ...]


def grouped(rows: Sequence[Row], past: int) -> list[RowGroup]:
    """Group the rows of a forward on ``past`` cache slots; rows without new real tokens are left out."""
    groups: dict[tuple[Spans, int, tuple[tuple[int, int, int], ...], bool], list[int]] = {}
    for index, row in enumerate(rows):
        before = span_count(row.spans, below=past)
        if row.length > before:
            runs = row.schedule.pieces(before, row.length)
            groups.setdefault((row.spans, before, runs, row.consecutive), []).append(index)
    return [RowGroup(tuple(indices), *key) for key, indices in groups.items()]


def tokens(x_BHLD: Tensor, start: int, stop: int) -> Tensor:
    """Return tokens ``start .. stop - 1``: a view, or the tensor itself if these are all of its tokens."""
    return x_BHLD if stop - start == x_BHLD.shape[2] else x_BHLD[:, :, start:stop]


def gather(x_BHLD: Tensor, spans: Spans) -> Tensor:
    """Return the tokens of the spans, as a view if there is one span."""
    if len(spans) == 1:
        return tokens(x_BHLD, *spans[0])
    return torch.cat([x_BHLD[:, :, start:stop] for start, stop in spans], dim=2)


def scatter(out_BHLD: Tensor, part_RHCD: Tensor, rows: tuple[int, ...], spans: Spans) -> None:
    """Write the outputs of a group to its rows and to the slots of its new tokens, in place."""
    first = 0
    for start, stop in spans:
        for index, row in enumerate(rows):
            out_BHLD[row, :, start:stop] = part_RHCD[index, :, first : first + stop - start]
        first += stop - start
