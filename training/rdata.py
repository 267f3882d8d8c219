"""A reader for the few kinds of R objects in the novels' database."""

from __future__ import annotations

import struct
from typing import Any

_NULL, _SYMBOL, _PAIRS, _CHARS = 254, 1, 2, 9
_LOGICALS, _INTEGERS, _REALS, _STRINGS, _VECTOR, _REFERENCE = 10, 13, 14, 16, 19, 255
_HAS_ATTRIBUTES, _HAS_TAG = 0x200, 0x400


class RDataError(Exception):
    """The bytes are not an R serialisation of a kind that this module reads."""


def unserialize(data: bytes) -> Any:
    """Decode one R object from R's XDR serialisation.

    Parameters
    ----------
    data
        The serialised object, uncompressed.

    Returns
    -------
    object
        Vectors as lists, named lists as dictionaries, NULL and missing strings as None.
    """
    return _Reader(data).read()


class _Reader:
    def __init__(self, data: bytes) -> None:
        if data[:2] != b"X\n":
            raise RDataError("not an R object in XDR form")
        self.data = data
        self.at = 2
        self.symbols: list[Any] = []
        version, _, _ = self._ints(3)
        if version == 3:
            encoding_size = self._int()
            self.at += encoding_size

    def _ints(self, count: int) -> tuple[int, ...]:
        values = struct.unpack_from(f">{count}i", self.data, self.at)
        self.at += 4 * count
        return values

    def _int(self) -> int:
        return self._ints(1)[0]

    def read(self) -> Any:
        flags = self._int()
        kind = flags & 0xFF
        if kind == _NULL:
            return None
        if kind == _REFERENCE:
            return self.symbols[(flags >> 8) - 1]
        if kind == _SYMBOL:
            self.symbols.append(self.read())
            return self.symbols[-1]
        if kind == _CHARS:
            return self._chars()
        if kind == _PAIRS:
            return self._pairs(flags)
        value = self._vector(kind)
        if flags & _HAS_ATTRIBUTES:
            attributes = self.read() or {}
            if "names" in attributes:
                return dict(zip(attributes["names"], value, strict=True))
        return value

    def _chars(self) -> str | None:
        size = self._int()
        if size < 0:
            return None
        self.at += size
        return self.data[self.at - size : self.at].decode("utf-8")

    def _pairs(self, flags: int) -> dict[Any, Any]:
        if flags & _HAS_ATTRIBUTES:
            self.read()
        tag = self.read() if flags & _HAS_TAG else None
        first = self.read()
        rest = self.read()
        return {tag: first, **(rest or {})}

    def _vector(self, kind: int) -> list[Any]:
        count = self._int()
        if kind in (_LOGICALS, _INTEGERS):
            return list(self._ints(count))
        if kind == _REALS:
            self.at += 8 * count
            return list(struct.unpack_from(f">{count}d", self.data, self.at - 8 * count))
        if kind in (_STRINGS, _VECTOR):
            return [self.read() for _ in range(count)]
        raise RDataError(f"an R object of type {kind} is not read here")
