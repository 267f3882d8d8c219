"""The record of a KV cache: for every row its real tokens, their position ids and its schedule of prompt lengths.

A forward extends the record by its new tokens, the plans follow from it, and it stays on the cache as part of
:class:`~posenc.hf.cache.state.CacheState`.

Shape letters: B batch, L new tokens, P slots before a forward, T slots so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from posenc.errors import CacheMismatchError
from posenc.planning.planner import Planner
from posenc.planning.schedule import Schedule

Spans = tuple[tuple[int, int], ...]
"""Half-open runs of slots that hold real tokens, in order."""


def span_count(spans: Spans, below: int | None = None) -> int:
    """Count the slots of the spans, or those below slot ``below``."""
    return sum(max(0, (stop if below is None else min(stop, below)) - start) for start, stop in spans)


def cut_spans(spans: Spans, low: int, high: int) -> Spans:
    """Return the part of the spans inside ``[low, high)``, counted from ``low``."""
    parts = ((max(start, low) - low, min(stop, high) - low) for start, stop in spans)
    return tuple((start, stop) for start, stop in parts if stop > start)


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    Parameters
    ----------
    spans : Spans
        Slots of its real tokens.
    schedule : Schedule
        Which prompt length each of its tokens plans with.
    consecutive : bool
        Whether its position ids count up by one. Only neighbouring slots are compared: after right padding,
        ``generate`` continues with other ids, and the row's plan counts its real tokens anyway.
    dropped : int
        Real tokens that a bounded cache has dropped; spans, length and schedule count those that it still holds.
    """

    spans: Spans = ()
    schedule: Schedule = field(default_factory=Schedule)
    consecutive: bool = True
    dropped: int = 0

    @property
    def length(self) -> int:
        """Real tokens in the cache."""
        return span_count(self.spans)


@dataclass(frozen=True)
class CacheRecord:
    """The tokens that a cache holds.

    Parameters
    ----------
    fingerprint : str
        The strategy that filled the cache.
    position_ids_BT : int64 [B, T]
        Position ids that were passed to the model, one per slot.
    rows : tuple of Row
        One per row of the batch.
    dropped : int
        Slots that a bounded cache has dropped; the others are counted from the first that it holds.
    """

    fingerprint: str
    position_ids_BT: Tensor
    rows: tuple[Row, ...]
    dropped: int = 0

    @property
    def slots(self) -> int:
        """How many slots the cache holds."""
        return self.position_ids_BT.shape[1]

    def extended(
        self,
        past: int,
        position_ids_BL: Tensor,
        real_BL: Tensor | None,
        planner: Planner,
        *,
        candidates: int = 0,
        announced: list[int] | None = None,
    ) -> CacheRecord:
        """Return the record after a forward of ``L`` new slots on the first ``past`` slots.

        Parameters
        ----------
        past : int
            Slots before the forward; later ones were cropped.
        position_ids_BL : int64 [B, L]
            Position ids of the new slots.
        real_BL : bool [B, L] or None
            False where a new slot is padding; None if none is.
        planner : Planner
            Extends the schedules.
        candidates : int
            How many of the new tokens are guesses of assisted generation.
        announced : list of int, optional
            Announced prompt length of each row, in tokens.

        Raises
        ------
        CacheMismatchError
            If the batch has another size than the record, whose rows differ.
        InvalidInputError
            If there are more tokens than were announced.
        """
        new = position_ids_BL.shape[1]
        past_ids_BP = self.position_ids_BT[:, :past]
        rows = self.rows
        batch = position_ids_BL.shape[0]
        if len(rows) != batch:
            past_ids_BP, rows = self._repeated(batch, past_ids_BP)
        ids_BT = torch.cat((past_ids_BP.to(position_ids_BL.device), position_ids_BL), dim=1)
        extended = []
        for index, row in enumerate(rows):
            new_spans = ((0, new),) if real_BL is None else _runs(real_BL[index])
            past_spans = cut_spans(row.spans, 0, past)
            before = span_count(past_spans)
            spans = join_spans(past_spans, tuple((start + past, stop + past) for start, stop in new_spans))
            consecutive = (row.consecutive or not before) and all(
                _counts_up(ids_BT[index, max(start, past - 1) : stop]) for start, stop in spans if stop > past
            )
            schedule = planner.extend(
                row.schedule,
                before,
                span_count(spans),
                candidates=candidates,
                announced=None if announced is None else announced[index],
            )
            extended.append(Row(spans, schedule, consecutive, row.dropped))
        return CacheRecord(self.fingerprint, ids_BT, tuple(extended), self.dropped)

    def hiding(self, shown_BP: Tensor) -> CacheRecord:
        """Return the record of the first ``P`` slots with some of them hidden: bool [B, P], True if shown."""
        rows = (replace(row, spans=_runs(shown_P)) for row, shown_P in zip(self.rows, shown_BP, strict=True))
        return replace(self, position_ids_BT=self.position_ids_BT[:, : shown_BP.shape[1]], rows=tuple(rows))

    def chosen(self, rows: Sequence[int]) -> CacheRecord:
        """Return the record of a cache that now holds these rows of the former batch, in this order."""
        index = list(rows)
        return replace(self, position_ids_BT=self.position_ids_BT[index], rows=tuple(self.rows[row] for row in index))

    def _repeated(self, batch: int, past_ids_BP: Tensor) -> tuple[Tensor, tuple[Row, ...]]:
        """Return position ids and rows for another batch size, which is only safe if all rows are alike."""
        if not self.rows:
            return past_ids_BP.new_zeros((batch, 0)), (Row(),) * batch
        alike = all(row == self.rows[0] for row in self.rows) and bool((past_ids_BP == past_ids_BP[:1]).all())
        if not alike:
            raise CacheMismatchError(
                f"the cache was filled with a batch of {len(self.rows)} different rows and is now read with {batch}: "
                "posenc cannot tell which row is which. Expand the batch before the first forward."
            )
        return past_ids_BP[:1].expand(batch, -1), (self.rows[0],) * batch


def empty_record(fingerprint: str, batch: int, device: torch.device) -> CacheRecord:
    """Return the record of an empty cache for a batch of so many rows."""
    return CacheRecord(fingerprint, torch.zeros((batch, 0), dtype=torch.long, device=device), (Row(),) * batch)


def checked_record(record: CacheRecord | None, past: int, fingerprint: str) -> CacheRecord:
    """Return the record of a cache that holds ``past`` tokens, after checking that it belongs to them.

    Raises
    ------
    CacheMismatchError
        If tokens in the cache were written without posenc or under another strategy.
    """
    if record is None:
        raise CacheMismatchError(
            f"the cache holds {past} tokens that were written without posenc, so that their keys are already rotated, "
            "or by a forward that broke off. Start from an empty cache."
        )
    if record.fingerprint != fingerprint:
        raise CacheMismatchError(
            f"the cache was filled by {record.fingerprint}, and the model now runs {fingerprint}: its values were "
            "computed under other positions. Start from an empty cache."
        )
    seen = record.slots + record.dropped
    if seen < past:
        raise CacheMismatchError(
            f"the cache holds {past} tokens, but posenc saw only {seen} of them: an unpatched model continued it, "
            "or a forward broke off. Start from an empty cache."
        )
    return record


def _counts_up(ids_L: Tensor) -> bool:
    return bool((ids_L.diff() == 1).all())


def _runs(real_L: Tensor) -> Spans:
    """Return the half-open runs of True."""
    flags = [False, *real_L.tolist(), False]
    edges = [i for i in range(len(flags) - 1) if flags[i] != flags[i + 1]]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def join_spans(first: Spans, second: Spans) -> Spans:
    """Concatenate spans, and join the two that touch."""
    if first and second and first[-1][1] == second[0][0]:
        return (*first[:-1], (first[-1][0], second[0][1]), *second[1:])
    return first + second
