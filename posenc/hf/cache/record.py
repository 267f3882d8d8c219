"""What posenc remembers about a KV cache: positions, padding and schedules of every row.

It is part of the state that travels with the cache (:class:`~posenc.hf.cache.state.CacheState`).
Shape letters: B batch, L new tokens, T tokens in the cache slots so far.
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
    """Number of real slots, or of those below ``below``."""
    return sum(max(0, (stop if below is None else min(stop, below)) - start) for start, stop in spans)


def cut_spans(spans: Spans, low: int, high: int) -> Spans:
    """The part of the spans inside ``[low, high)``, counted from ``low``."""
    cut = ((max(start, low) - low, min(stop, high) - low) for start, stop in spans)
    return tuple((start, stop) for start, stop in cut if stop > start)


@dataclass(frozen=True)
class Row:
    """One batch row: its real slots, its schedule, and whether its position ids count up by one.

    Only neighbouring slots are compared: after right padding, ``generate`` continues with ids of its
    own making, and the row's plan counts its real tokens anyway. ``dropped`` real tokens were forgotten
    by a bounded cache; spans, length and schedule count those it still holds.
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
    """State of one cache after a forward.

    Parameters
    ----------
    fingerprint : str
        The strategy that filled the cache.
    position_ids_BT : int64 [B, T]
        Position ids as the model was given them, one per slot.
    rows : tuple of Row
        One per batch row.
    dropped : int
        Slots that a bounded cache has forgotten; the others are counted from its first one.
    """

    fingerprint: str
    position_ids_BT: Tensor
    rows: tuple[Row, ...]
    dropped: int = 0

    @property
    def slots(self) -> int:
        """Cache slots filled and still held."""
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
        """The record after a forward of ``L`` new slots on the first ``past`` slots.

        Parameters
        ----------
        position_ids_BL : int64 [B, L]
            Position ids of the new slots.
        real_BL : bool [B, L] or None
            False where a new slot is padding; None when none is.
        """
        new = position_ids_BL.shape[1]
        kept = self.position_ids_BT[:, :past]
        rows = self.rows
        batch = position_ids_BL.shape[0]
        if len(rows) != batch:
            kept, rows = self._repeated(batch, kept)
        ids = torch.cat((kept.to(position_ids_BL.device), position_ids_BL), dim=1)
        fresh = []
        for index, row in enumerate(rows):
            added = ((0, new),) if real_BL is None else _runs(real_BL[index])
            spans = cut_spans(row.spans, 0, past)
            before = span_count(spans)
            merged = join_spans(spans, tuple((a + past, b + past) for a, b in added))
            after = span_count(merged)
            steady = row.consecutive if before else True
            steady = steady and all(_counts_up(ids[index, max(a, past - 1) : b]) for a, b in merged if b > past)
            schedule = planner.extend(
                row.schedule,
                before,
                after,
                candidates=candidates,
                announced=None if announced is None else announced[index],
            )
            fresh.append(Row(merged, schedule, steady, row.dropped))
        return CacheRecord(self.fingerprint, ids, tuple(fresh), self.dropped)

    def hiding(self, shown_BP: Tensor) -> CacheRecord:
        """The record of the first ``P`` slots, of which some are hidden from now on: bool [B, P], True where shown."""
        rows = (replace(row, spans=_runs(shown_P)) for row, shown_P in zip(self.rows, shown_BP, strict=True))
        return replace(self, position_ids_BT=self.position_ids_BT[:, : shown_BP.shape[1]], rows=tuple(rows))

    def chosen(self, rows: Sequence[int]) -> CacheRecord:
        """The record of a cache whose rows are now these of it, in this order."""
        index = list(rows)
        return replace(self, position_ids_BT=self.position_ids_BT[index], rows=tuple(self.rows[row] for row in index))

    def _repeated(self, batch: int, kept: Tensor) -> tuple[Tensor, tuple[Row, ...]]:
        """Rows of a cache whose batch was multiplied or cut since: only safe when all rows are alike."""
        if not self.rows:
            return kept.new_zeros((batch, 0)), (Row(),) * batch
        alike = all(row == self.rows[0] for row in self.rows) and bool((kept == kept[:1]).all())
        if not alike:
            raise CacheMismatchError(
                f"the cache was filled with a batch of {len(self.rows)} unequal rows and is now read with {batch}: "
                "posenc cannot tell which row is which. Expand the batch before the first forward."
            )
        return kept[:1].expand(batch, -1), (self.rows[0],) * batch


def empty_record(fingerprint: str, batch: int, device: torch.device) -> CacheRecord:
    """The record of an empty cache."""
    return CacheRecord(fingerprint, torch.zeros((batch, 0), dtype=torch.long, device=device), (Row(),) * batch)


def checked_record(record: CacheRecord | None, past: int, fingerprint: str) -> CacheRecord:
    """The record of a cache that holds ``past`` tokens, checked.

    Raises
    ------
    CacheMismatchError
        If the cache holds tokens that posenc did not put there, or that another strategy did.
    """
    if record is None:
        raise CacheMismatchError(
            f"the cache holds {past} tokens that were written without posenc, so that their keys are rotated already, "
            "or by a forward that broke off half-way. Start from an empty cache."
        )
    if record.fingerprint != fingerprint:
        raise CacheMismatchError(
            f"the cache was filled by {record.fingerprint}, and the model now runs {fingerprint}: its values were "
            "computed under other positions. Start from an empty cache."
        )
    seen = record.slots + record.dropped
    if seen < past:
        raise CacheMismatchError(
            f"the cache holds {past} tokens, but posenc saw only {seen} of them: an unpatched model went on with it, "
            "or a forward broke off half-way. Start from an empty cache."
        )
    return record


def _counts_up(ids_L: Tensor) -> bool:
    return bool((ids_L.diff() == 1).all())


def _runs(real_L: Tensor) -> Spans:
    """Half-open runs of True."""
    flags = [False, *real_L.tolist(), False]
    edges = [i for i in range(len(flags) - 1) if flags[i] != flags[i + 1]]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def join_spans(first: Spans, second: Spans) -> Spans:
    """Concatenate spans, joining the two that touch."""
    if first and second and first[-1][1] == second[0][0]:
        return (*first[:-1], (first[-1][0], second[0][1]), *second[1:])
    return first + second
