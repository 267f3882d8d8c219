"""Rotated copies of the keys of a whole cache, and the check that they still belong to its raw keys.

A decoding step rotates its new keys only and takes the copies of the others from here. But a cache may be cropped,
reordered for beams, copied or written to between two forwards, and posenc is not told. So after a forward every layer's
key tensor is remembered. Before the next forward it must be the same object, not written to since; otherwise the copies
of that layer are made anew.

The tensor's version counter shows writes, except those through ``.data``, numpy or DLPack. With
``posenc.apply(..., cache="raw")`` no copies are kept, and raw keys may be changed in any way.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from posenc.kernels.rotated_key_cache import RotatedKeyCache

FEW_TOKENS = 16
"""A forward of more new tokens than this counts as a prompt: the copies that it makes are not kept."""


class RotatedKeys:
    """:class:`~posenc.kernels.rotated_key_cache.RotatedKeyCache` of every layer and group of rows of one cache.

    Writes to raw keys through ``.data``, numpy or DLPack are not noticed (see the module).
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, tuple[int, ...], int], RotatedKeyCache] = {}
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}
        self._served: set[int] = set()
        self._shared: set[int] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> RotatedKeys:
        return RotatedKeys()

    def __reduce__(self) -> tuple[type[RotatedKeys], tuple[()]]:
        return RotatedKeys, ()

    @property
    def bytes(self) -> int:
        """Memory of the copies, in bytes."""
        return sum(kept.bytes for kept in self._kept.values())

    def serves(self, layer: int) -> bool:
        """Return whether copies can be kept for a layer; called once per attention call.

        They cannot if one module attends several times in a forward (Zamba 2): layers that share a module have one
        index, but keys of their own.
        """
        if layer in self._served:
            self._shared.add(layer)
            self._drop(layer)
        self._served.add(layer)
        return layer not in self._shared

    def of(self, layer: int, rows: tuple[int, ...], padding: int) -> RotatedKeyCache:
        """Return the rotated keys of a group of rows in one layer, without their first ``padding`` slots."""
        return self._kept.setdefault((layer, rows, padding), RotatedKeyCache())

    def saw(self, layer: int, keys: Tensor, slots: int) -> None:
        """Remember the raw keys that a layer's copies were made of; the first ``slots`` of them are filled."""
        if keys.is_inference():  # it has no version counter, so nothing can be kept for the next step
            self._drop(layer)
        else:
            self._seen[layer] = weakref.ref(keys), keys._version, slots

    def check(self, cache: Any, past: int) -> None:
        """Drop the copies whose raw keys are not those seen last, before a forward on ``past`` slots."""
        self._served.clear()
        layers = getattr(cache, "layers", ())
        for layer, (seen, version, slots) in list(self._seen.items()):
            keys = getattr(layers[layer], "keys", None) if layer < len(layers) else None
            changed = not isinstance(keys, Tensor) or keys.is_inference() or keys._version != version
            if changed or past > slots or not _same_tokens(keys, seen()):
                self._drop(layer)
            elif past < slots:
                for key in [key for key in self._kept if key[0] == layer]:
                    self._kept[key].truncate(past - key[2])

    def _drop(self, layer: int) -> None:
        self._seen.pop(layer, None)
        for key in [key for key in self._kept if key[0] == layer]:
            del self._kept[key]


def _same_tokens(keys: Any, seen: Tensor | None) -> bool:
    """Return whether ``keys`` is the tensor that was seen, or a view of its first tokens (a cropped cache)."""
    if seen is None or keys is seen:
        return keys is seen
    return keys._base is seen and keys.data_ptr() == seen.data_ptr() and keys.stride() == seen.stride()
