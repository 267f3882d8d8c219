"""Rotated keys kept from one decoding step to the next, so that a step rotates new keys only.

Shape letters: B batch, H key/value heads, L tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posenc.rope import Rotary
from posenc.segment import Segment

AHEAD = 32
"""Keys that are rotated beyond those a segment attends, where they exist already: the next steps will attend them."""

ROOM = 256
"""Tokens that a buffer can grow by before it moves, at least."""


@dataclass
class _Copy:
    """Keys ``first .. stop - 1`` of one position map, rotated; the first slot of the buffer is that of key ``at``."""

    buffer_BHLD: Tensor
    at: int
    first: int
    stop: int
    segment: Segment
    rotary_key: tuple[Any, ...]

    def reusable_from(self, segment: Segment, keys: slice, k_BHLD: Tensor, rotary: Rotary) -> int | None:
        """The key from which on the copy serves this segment too, up to ``stop``; None if the copy is of no use.

        It is of use if it holds some of the keys, by the same map and frequencies, in a tensor of the same kind.
        """
        like = self.buffer_BHLD
        if rotary.key != self.rotary_key or keys.start > self.stop or keys.stop < self.first:
            return None
        if segment.interpolation != self.segment.interpolation:
            return None
        if like.dtype != k_BHLD.dtype or like.device != k_BHLD.device or like.shape[:2] != k_BHLD.shape[:2]:
            return None
        (root, offset), (held_root, held_offset) = segment.root, self.segment.root
        if root is held_root and offset == held_offset:
            return self.first
        first = max(self.first, keys.start)
        held = slice(first, self.stop)
        return first if np.array_equal(segment.key_positions[held], self.segment.key_positions[held]) else None

    def slots(self, first: int, stop: int) -> Tensor:
        """The memory of some keys, a view [B, H, L, D]."""
        return self.buffer_BHLD.narrow(2, first - self.at, stop - first)

    def make_room(self, first: int, stop: int) -> None:
        """Have slots for these keys, in a larger buffer if need be; what the copy holds of them stays."""
        old = self.buffer_BHLD
        if first >= self.at and stop - self.at <= old.shape[2]:
            return
        length = stop - first
        shape = (*old.shape[:2], length + max(ROOM, length // 8), old.shape[3])
        low, high = max(self.first, first), min(self.stop, stop)
        held = self.slots(low, high) if low < high else None
        with torch.inference_mode(False):  # the next step may run outside of it, and must be able to write here
            self.buffer_BHLD, self.at = torch.empty(shape, dtype=old.dtype, device=old.device), first
        self.first, self.stop = low, max(low, high)
        if held is not None:
            self.slots(low, high).copy_(held)


class RotatedKeyCache:
    """The rotated copies of one layer's raw keys, for decoding with :func:`posenc.attention`.

    Hand the same object to every step of one sequence. Segments whose map of the keys does not change
    from step to step (every built-in strategy while ``prompt`` is fixed) then rotate the new keys only.
    It costs the memory of one more copy of the keys where every key lies in one segment; keys that
    appear in several maps at once are held once per map. Changed maps or frequencies are noticed;
    changed raw keys are not: call :meth:`truncate` after cutting the cache, :meth:`clear` after
    reordering or replacing its rows or writing to them in any way.
    """

    def __init__(self) -> None:
        self._copies: dict[str, _Copy] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._copies.clear()

    def truncate(self, tokens: int) -> None:
        """Forget the keys from ``tokens`` on."""
        for copy in self._copies.values():
            copy.stop = max(copy.first, min(copy.stop, tokens))

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(copy.buffer_BHLD.numel() * copy.buffer_BHLD.element_size() for copy in self._copies.values())

    def rotated(
        self,
        segment: Segment,
        keys: slice,
        k_BHLD: Tensor,
        rotary: Rotary,
        rotate: Callable[[slice, Tensor], Tensor],
        span: slice | None = None,
    ) -> Tensor:
        """The keys of a segment's map, rotated; those that the cache does not hold yet are computed and kept.

        Parameters
        ----------
        segment : Segment
            Its key positions are the map.
        keys : slice
            Which keys.
        k_BHLD : Tensor
            All raw keys.
        rotate : callable
            Rotates a slice of the keys; it may use the memory that it is given for the result.
        span : slice, optional
            Takes in more keys on either side. Those are rotated every time.

        Returns
        -------
        Tensor
            The keys of ``span``, or else ``keys``, [B, H, L, D]: a view of the cache's memory.
        """
        span = keys if span is None else span
        copy = self._copy_for(segment, keys, span, k_BHLD, rotary)
        ahead = min(keys.stop + AHEAD, k_BHLD.shape[2]) if keys.stop > copy.stop else copy.stop
        reach = span.stop if span.stop > keys.stop else ahead
        copy.make_room(span.start, reach)
        if span.start < keys.start:  # the slots of these keys are needed
            copy.first = max(copy.first, keys.start)
        if span.stop > keys.stop:
            copy.stop = min(copy.stop, keys.stop)
        for start, stop in ((span.start, copy.first), (copy.stop, reach)):
            if start < stop:
                slots_BHLD = copy.slots(start, stop)
                rotated_BHLD = rotate(slice(start, stop), slots_BHLD)
                if rotated_BHLD is not slots_BHLD:
                    slots_BHLD.copy_(rotated_BHLD)
        copy.first = min(copy.first, keys.start)
        copy.stop = keys.stop if span.stop > keys.stop else reach
        copy.segment = segment
        return copy.slots(span.start, span.stop)

    def _copy_for(self, segment: Segment, keys: slice, span: slice, k_BHLD: Tensor, rotary: Rotary) -> _Copy:
        """The copy of a segment's map, cut to what serves this call; an empty one where there is none of use."""
        copy = self._copies.get(segment.name)
        first = None if copy is None else copy.reusable_from(segment, keys, k_BHLD, rotary)
        if copy is None or first is None:
            empty = k_BHLD.new_empty((*k_BHLD.shape[:2], 0, k_BHLD.shape[3]))
            first = keys.start
            copy = self._copies[segment.name] = _Copy(empty, span.start, first, first, segment, rotary.key)
        copy.first = first
        return copy
