"""What the keys of a cache looked like after posenc's last forward, to tell what happened to them since.

Between two forwards anybody may cut a cache back, reorder its rows, drop keys from its middle, reset it, or let an
unpatched model fill it; the cache itself tells nobody. So one channel of the keys of one layer is copied, and compared
before the next forward unless that layer still holds the very same tensor.

Shape letters: B batch, H heads, T slots, P slots in the cache now, K slots that the layer holds, D head_dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posenc.errors import CacheMismatchError
from posenc.hf.cache.record import CacheRecord

HEADS = 4
"""Heads that are copied, at most."""

CLOSE = 0.1
"""Of the largest key: how far an edited key may be from what it was."""

ROOM = 256
"""Slots that the copy can grow by before it moves, at least."""


@dataclass
class Witness:
    """A copy of one channel of a layer's keys.

    Parameters
    ----------
    layer, channel : int
        Which layer of the cache, and which channel: one that is rotated, so that rotated keys differ from raw ones.
    """

    layer: int
    channel: int

    def __post_init__(self) -> None:
        self._copy_BHT: Tensor | None = None
        self._first = self._stop = 0
        self._seen: weakref.ref[Tensor] | None = None
        self._version: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Witness:
        twin = Witness(self.layer, self.channel)
        twin._first, twin._stop = self._first, self._stop
        twin._copy_BHT = None if self._copy_BHT is None else self._copy_BHT.clone()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_seen": None, "_version": None}

    def note(self, cache: Any, slots: int, past: int) -> None:
        """After a forward that left ``slots`` slots in the cache, the first ``past`` of them as they were before it."""
        keys = self._keys(cache, slots)
        if keys is None:
            self._copy_BHT = self._seen = None
            return
        first, held_BHK = _first_slot(keys, slots), self._channel_of(keys)
        copy_BHT, known = self._copy_BHT, min(self._stop, past) if first == self._first == 0 else first
        if copy_BHT is None or copy_BHT.shape[:2] != held_BHK.shape[:2] or copy_BHT.device != held_BHK.device:
            copy_BHT, known = held_BHK.new_empty((*held_BHK.shape[:2], 0)), first
        if slots - first > copy_BHT.shape[2]:
            room = slots - first + max(ROOM, slots // 8)
            grown_BHT = copy_BHT.new_empty((*copy_BHT.shape[:2], room))
            grown_BHT[..., : known - first] = copy_BHT[..., : known - first]
            copy_BHT = grown_BHT
        copy_BHT[..., known - first : slots - first] = held_BHK[..., known - first : slots - first]
        self._copy_BHT, self._first, self._stop = copy_BHT, first, slots
        self._seen, self._version = weakref.ref(keys), _version(keys)

    def check(self, cache: Any, record: CacheRecord, past: int, batch: int) -> CacheRecord:
        """The record of the rows that the cache holds now, before a forward on ``past`` slots.

        Raises
        ------
        CacheMismatchError
            If its keys are not those that posenc left there, cut back at the end and reordered by rows at most.
        """
        keys = self._keys(cache, past)
        if keys is None or self._copy_BHT is None:
            if past < record.slots:
                raise CacheMismatchError(
                    f"the cache held {record.slots} tokens and holds {past} now, and posenc cannot tell which of them "
                    "were dropped, from its end or its middle (cache compression). Start from an empty cache, or "
                    "compress it without posenc."
                )
            return record
        if len(record.rows) == batch and self._untouched(keys):
            return record
        first = _first_slot(keys, past)
        low, high = max(first, self._first), min(past, self._stop)
        now_BHT = self._channel_of(keys)[..., low - first : high - first]
        then_BHT = self._copy_BHT[..., low - self._first : high - self._first].to(now_BHT.device)
        if low >= high or now_BHT.dtype != then_BHT.dtype or now_BHT.shape[1] != then_BHT.shape[1]:
            raise _mismatch(past)
        same = now_BHT.shape == then_BHT.shape
        if same and torch.equal(_bits(now_BHT), _bits(then_BHT)):
            return record
        rows = _source_rows(now_BHT, then_BHT, record)
        if rows is not None:
            self._copy_BHT = self._copy_BHT[rows]
            return record.chosen(rows)
        if past == record.slots and same and _mostly_same(now_BHT, then_BHT):
            return record  # somebody edits keys in place
        raise _mismatch(past)

    def _untouched(self, keys: Tensor) -> bool:
        """The very tensor of the last forward, unwritten since, or the first tokens of it (a crop)."""
        seen = None if self._seen is None else self._seen()
        if seen is None or (keys.is_inference() and keys.shape[2] > self._stop):  # a static cache, written in place
            return False
        cut = keys._base is seen and keys.data_ptr() == seen.data_ptr() and keys.stride() == seen.stride()
        return (keys is seen or (cut and keys.shape[:2] == seen.shape[:2])) and _version(keys) == self._version

    def _keys(self, cache: Any, slots: int) -> Tensor | None:
        """The layer's keys, where it holds them all, or the last ones of a sliding window; not quantized ones."""
        layers = getattr(cache, "layers", ())
        layer = layers[self.layer] if self.layer < len(layers) else None
        keys = getattr(layer, "keys", None)
        if not isinstance(keys, Tensor) or keys.ndim != 4 or self.channel >= keys.shape[3]:
            return None
        if any("Quantized" in kind.__name__ for kind in type(layer).__mro__):
            return None
        return keys if keys.shape[2] >= slots or getattr(layer, "is_sliding", False) else None

    def _channel_of(self, keys_BHKD: Tensor) -> Tensor:
        return keys_BHKD.detach()[:, :HEADS, :, self.channel]


def witness_of(cache: Any, places: Sequence[tuple[int, int]]) -> Witness | None:
    """The witness of a cache: that of the first of ``(layer, channel)`` that it has keys of."""
    layers = getattr(cache, "layers", ())
    for layer, channel in places:
        keys = getattr(layers[layer], "keys", None) if layer < len(layers) else None
        if isinstance(keys, Tensor) and keys.ndim == 4:
            return Witness(layer, channel)
    return None


def _mismatch(past: int) -> CacheMismatchError:
    return CacheMismatchError(
        f"the cache holds {past} tokens whose keys are not those that posenc left there: keys were dropped from its "
        "middle (cache compression), it was reset and filled by an unpatched model, or rows were mixed. posenc cannot "
        "tell which position each key has. Start from an empty cache, or compress it without posenc."
    )


def _first_slot(keys: Tensor, slots: int) -> int:
    return max(0, slots - keys.shape[2])


def _version(keys: Tensor) -> int | None:
    return None if keys.is_inference() else keys._version


def _bits(x: Tensor) -> Tensor:
    """The same memory as whole numbers: equal for equal NaN too."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _source_rows(now_BHT: Tensor, then_BHT: Tensor, record: CacheRecord) -> list[int] | None:
    """The earlier row that each row is a copy of, or None where some row is none of them, or one of several."""
    now_BN, then_BN = _bits(now_BHT).flatten(1), _bits(then_BHT).flatten(1)
    factor_N = torch.arange(1, now_BN.shape[1] + 1, device=now_BN.device) * 2654435761
    digests = [(x.long() * factor_N).sum(1).tolist() for x in (now_BN, then_BN)]
    rows = []
    for index, digest in enumerate(digests[0]):
        found = [
            row for row, own in enumerate(digests[1]) if own == digest and torch.equal(now_BN[index], then_BN[row])
        ]
        if not found or not all(_alike(record, found[0], row) for row in found[1:]):
            return None
        rows.append(found[0])
    return rows


def _alike(record: CacheRecord, first: int, second: int) -> bool:
    ids_BT = record.position_ids_BT
    return record.rows[first] == record.rows[second] and torch.equal(ids_BT[first], ids_BT[second])


def _mostly_same(now_BHT: Tensor, then_BHT: Tensor) -> bool:
    """Whether at least half of every row's slots are about what they were: somebody edits keys, or rounds them."""
    near = CLOSE * then_BHT.abs().nan_to_num().amax()
    same_BT = ((now_BHT - then_BHT).abs() <= near).all(1) | (now_BHT.isnan() & then_BHT.isnan()).all(1)
    return bool((same_BT.sum(1) * 2 >= same_BT.shape[1]).all())
