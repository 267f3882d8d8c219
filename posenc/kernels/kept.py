"""Rotated keys kept from one decoding step to the next: a step rotates what is new.

Shape letters: B batch, H key/value heads, L tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posenc.plan import Segment
from posenc.rope import Rotary

AHEAD = 32
"""Keys that are rotated beyond those a segment reads, where they are there already: the next steps will read them."""

ROOM = 256
"""Tokens that a buffer can grow by before it moves, at least."""


@dataclass
class _Copy:
    """Keys ``first .. stop - 1`` of one position map, rotated, at the beginning of a buffer."""

    buffer_BHLD: Tensor
    first: int
    stop: int
    segment: Segment
    rotary: Rotary

    def continues(self, segment: Segment, first: int, k_BHLD: Tensor, rotary: Rotary) -> bool:
        """Whether this holds the beginning of the wanted keys: the same map, rotary and kind of tensor."""
        like = self.buffer_BHLD
        if rotary is not self.rotary or not self.first <= first <= self.stop:
            return False
        if segment.interpolation != self.segment.interpolation:
            return False
        if like.dtype != k_BHLD.dtype or like.device != k_BHLD.device or like.shape[:2] != k_BHLD.shape[:2]:
            return False
        if _root(segment) == _root(self.segment):
            return True
        known = slice(first, self.stop)
        return np.array_equal(segment.key_positions[known], self.segment.key_positions[known])


class KeptKeys:
    """The rotated copies of one layer's raw keys, for decoding with :func:`posenc.attention`.

    Hand the same object to every step of one sequence. Segments whose map of the keys does not change
    from step to step (every built-in strategy while ``prompt`` is fixed) then rotate the new keys only.
    It costs the memory of one more copy of the keys where every key lies in one segment; keys that
    appear in several maps at once are held once per map. Changed maps or frequencies are noticed;
    changed raw keys are not: call :meth:`truncate` after cutting the cache, :meth:`clear` after
    reordering or replacing its rows.
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
        rotate: Callable[[slice], Tensor],
    ) -> Tensor:
        """The keys of a segment's map, rotated; ``rotate`` makes those that are not here yet."""
        first, stop = keys.start, keys.stop
        copy = self._copies.get(segment.name)
        if copy is None or not copy.continues(segment, first, k_BHLD, rotary):
            copy = _Copy(k_BHLD.new_empty((*k_BHLD.shape[:2], 0, k_BHLD.shape[3])), first, first, segment, rotary)
            self._copies[segment.name] = copy
        if stop > copy.stop:
            reach = min(stop + AHEAD, k_BHLD.shape[2])
            self._make_room(copy, first, reach)
            new = slice(copy.stop - copy.first, reach - copy.first)
            copy.buffer_BHLD[:, :, new] = rotate(slice(copy.stop, reach))
            copy.stop = reach
        copy.segment = segment
        return copy.buffer_BHLD[:, :, first - copy.first : stop - copy.first]

    @staticmethod
    def _make_room(copy: _Copy, first: int, stop: int) -> None:
        old = copy.buffer_BHLD
        if stop - copy.first <= old.shape[2]:
            return
        length = stop - first
        grown = torch.empty(
            (*old.shape[:2], length + max(ROOM, length // 8), old.shape[3]), dtype=old.dtype, device=old.device
        )
        grown[:, :, : copy.stop - first] = old[:, :, first - copy.first : copy.stop - copy.first]
        copy.buffer_BHLD, copy.first = grown, first


def _root(segment: Segment) -> tuple[int, int]:
    root, offset = segment.origin or (segment, 0)
    return id(root), offset
