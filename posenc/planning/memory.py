"""How much memory plans hold, with everything that backends derived from them."""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Any

import numpy as np


def held_bytes(*values: Any) -> int:
    """Bytes of all arrays and tensors reachable from the values, on any device; shared memory counts once.

    Follows dicts, lists, tuples and dataclasses.
    """
    sizes: dict[int, int] = {}
    seen: set[int] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, np.ndarray):
            while isinstance(value.base, np.ndarray):
                value = value.base
            sizes[id(value)] = value.nbytes
        elif hasattr(value, "untyped_storage"):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            waiting.extend(value)
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
        elif is_dataclass(value) and not isinstance(value, type):
            waiting.extend(vars(value).values())
    return sum(sizes.values())
