"""Rotated keys of a whole cache, and the proof that they still belong to its raw keys.

A cache may be cropped, reordered for beams, copied or
written to between two forwards; none of that tells posenc. So every layer's key tensor is remembered
after a forward and must be the same object, unwritten since, before the next one; otherwise the
copies of that layer are made anew.

Writes are seen by the tensor's version counter. Those through ``.data``, numpy or DLPack do not move it:
``posenc.apply(..., cache="raw")`` keeps no copies and is right whatever is done to the raw keys.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from posenc.kernels.rotated_key_cache import RotatedKeyCache

FEW_TOKENS = 16
"""Forwards of more new tokens than this are prompts: their copies are made on the way and dropped."""


class RotatedKeys:
    """:class:`~posenc.kernels.rotated_key_cache.RotatedKeyCache` of every layer and group of rows of one cache.

    Raw keys that are written to through ``.data`` or numpy are not noticed: see ``cache="raw"`` above.
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
        """Memory held, in bytes."""
        return sum(kept.bytes for kept in self._kept.values())

    def serves(self, layer: int) -> bool:
        """Whether copies can be kept for a layer; not where one module attends several times in a forward (Zamba 2).

        Asked once per attention call: a module that layers share has one number and several sets of keys.
        """
        if layer in self._served:
            self._shared.add(layer)
            self._drop(layer)
        self._served.add(layer)
        return layer not in self._shared

    def of(self, layer: int, rows: tuple[int, ...], padding: int) -> RotatedKeyCache:
        """The rotated keys of a group of rows in one layer, ``padding`` slots of theirs left out."""
        return self._kept.setdefault((layer, rows, padding), RotatedKeyCache())

    def saw(self, layer: int, keys: Tensor, slots: int) -> None:
        """Note the raw keys that a layer's copies were made of, ``slots`` of them filled."""
        if keys.is_inference():  # writes to it leave no trace, so nothing can be kept for the next step
            self._drop(layer)
        else:
            self._seen[layer] = weakref.ref(keys), keys._version, slots

    def check(self, cache: Any, past: int) -> None:
        """Before a forward on ``past`` slots: forget the copies whose raw keys are not those seen last."""
        self._served.clear()
        layers = getattr(cache, "layers", ())
        for layer, (seen, version, slots) in list(self._seen.items()):
            keys = getattr(layers[layer], "keys", None) if layer < len(layers) else None
            written = not isinstance(keys, Tensor) or keys.is_inference() or keys._version != version
            if written or past > slots or not _same_tokens(keys, seen()):
                self._drop(layer)
            elif past < slots:
                for key in [key for key in self._kept if key[0] == layer]:
                    self._kept[key].truncate(past - key[2])

    def _drop(self, layer: int) -> None:
        self._seen.pop(layer, None)
        for key in [key for key in self._kept if key[0] == layer]:
            del self._kept[key]


def _same_tokens(keys: Any, seen: Tensor | None) -> bool:
    """True for the tensor itself, or for its first tokens (a cache cut back)."""
    if seen is None or keys is seen:
        return keys is seen
    return keys._base is seen and keys.data_ptr() == seen.data_ptr() and keys.stride() == seen.stride()
