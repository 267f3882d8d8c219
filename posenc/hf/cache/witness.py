"""Find out what happened to a cache between two forwards, from a copy of some of its keys.

Other code may crop a cache, reorder its rows, drop keys from its middle, reset it, or let an unpatched model fill it,
and posenc is not told. So after every forward :meth:`Witness.note` copies one channel of the keys of one layer. Before
the next forward :meth:`Witness.check` compares the copy, unless that layer still holds the same tensor.

Shape letters: B batch, H heads, N values of a row, T slots, K slots that the layer holds, D head_dim.
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
"""How many heads are copied, at most."""

CLOSE = 0.1
"""How far an edited key may be from what it was, as a fraction of the largest key."""

ROOM = 256
"""By how many slots, at least, the copy can grow before new memory is allocated."""


@dataclass
class Witness:
    """A copy of one channel of a layer's keys.

    Parameters
    ----------
    layer : int
        Index of the layer in the cache.
    channel : int
        Index of the channel. It is one that the layer rotates, so that rotated keys differ from raw ones.
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
        """Copy the keys of a cache of ``slots`` slots after a forward, which did not change the first ``past``."""
        keys = self._keys(cache, slots)
        if keys is None:
            self._copy_BHT = self._seen = None
            return
        first, channel_BHK = _first_slot(keys, slots), self._channel_of(keys)
        copy_BHT, copied = self._copy_BHT, min(self._stop, past) if first == self._first == 0 else first
        if copy_BHT is None or copy_BHT.shape[:2] != channel_BHK.shape[:2] or copy_BHT.device != channel_BHK.device:
            copy_BHT, copied = channel_BHK.new_empty((*channel_BHK.shape[:2], 0)), first
        if slots - first > copy_BHT.shape[2]:
            size = slots - first + max(ROOM, slots // 8)
            grown_BHT = copy_BHT.new_empty((*copy_BHT.shape[:2], size))
            grown_BHT[..., : copied - first] = copy_BHT[..., : copied - first]
            copy_BHT = grown_BHT
        copy_BHT[..., copied - first : slots - first] = channel_BHK[..., copied - first : slots - first]
        self._copy_BHT, self._first, self._stop = copy_BHT, first, slots
        self._seen, self._version = weakref.ref(keys), _version(keys)

    def check(self, cache: Any, record: CacheRecord, past: int, batch: int) -> CacheRecord:
        """Return the record of the rows that the cache holds now, before a forward on ``past`` slots.

        Parameters
        ----------
        cache : Cache
            The KV cache.
        record : CacheRecord
            The tokens that posenc left in the cache.
        past : int
            Slots that it holds now.
        batch : int
            Rows of the forward.

        Raises
        ------
        CacheMismatchError
            If its keys are not those that posenc left there, apart from a crop and from rows in another order.
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
            return record  # other code edits keys in place
        raise _mismatch(past)

    def _untouched(self, keys: Tensor) -> bool:
        """Return whether this is the tensor of the last forward, or its first tokens (a crop), not written to since."""
        seen = None if self._seen is None else self._seen()
        if seen is None or (keys.is_inference() and keys.shape[2] > self._stop):  # a static cache, written in place
            return False
        crop = keys._base is seen and keys.data_ptr() == seen.data_ptr() and keys.stride() == seen.stride()
        return (keys is seen or (crop and keys.shape[:2] == seen.shape[:2])) and _version(keys) == self._version

    def _keys(self, cache: Any, slots: int) -> Tensor | None:
        """Return the layer's keys, all or those of its sliding window; None if some are missing or quantized."""
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
    """Make the witness of a cache, at the first ``(layer, channel)`` for which it holds keys; None if there is none."""
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
    """Return the first slot that a layer still holds."""
    return max(0, slots - keys.shape[2])


def _version(keys: Tensor) -> int | None:
    return None if keys.is_inference() else keys._version


def _bits(x: Tensor) -> Tensor:
    """Return the same memory as integers, so that equal NaN compare equal."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _source_rows(now_BHT: Tensor, then_BHT: Tensor, record: CacheRecord) -> list[int] | None:
    """Return the earlier row that each row is a copy of; None if a row has no source, or several that differ."""
    now_BN, then_BN = _bits(now_BHT).flatten(1), _bits(then_BHT).flatten(1)
    factor_N = torch.arange(1, now_BN.shape[1] + 1, device=now_BN.device) * 2654435761
    digests = [(x.long() * factor_N).sum(1).tolist() for x in (now_BN, then_BN)]
    rows = []
    for index, digest in enumerate(digests[0]):
        sources = [
            row for row, then in enumerate(digests[1]) if then == digest and torch.equal(now_BN[index], then_BN[row])
        ]
        if not sources or not all(_alike(record, sources[0], row) for row in sources[1:]):
            return None
        rows.append(sources[0])
    return rows


def _alike(record: CacheRecord, first: int, second: int) -> bool:
    ids_BT = record.position_ids_BT
    return record.rows[first] == record.rows[second] and torch.equal(ids_BT[first], ids_BT[second])


def _mostly_same(now_BHT: Tensor, then_BHT: Tensor) -> bool:
    """Return whether at least half of each row's slots are about what they were, as when other code rounds keys."""
    near = CLOSE * then_BHT.abs().nan_to_num().amax()
    same_BT = ((now_BHT - then_BHT).abs() <= near).all(1) | (now_BHT.isnan() & then_BHT.isnan()).all(1)
    return bool((same_BT.sum(1) * 2 >= same_BT.shape[1]).all())
