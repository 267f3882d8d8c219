"""The mask function that posenc registers with transformers, and the measurement of what its masks allow.

While the probe runs, :func:`posenc_mask` notes every mask together with the function that defines it. Calling this
function for a query a million tokens into a text measures the sliding window of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from posenc.errors import UnsupportedModelError

FAR = 2**20
"""Query index at which the reach of a mask is measured; it lies beyond every sliding window."""


@dataclass
class NotedMask:
    """A mask, and the function that says what it allows.

    Parameters
    ----------
    mask : bool Tensor
        The mask that transformers made.
    function : callable
        Maps indices of row, head, query and key to whether the query sees the key.
    """

    mask: Tensor
    function: Any

    @cached_property
    def reach(self) -> int | None:
        """Width of the sliding window in tokens, ``FAR`` for plain causal attention, None for any other pattern."""
        last = FAR + 7
        keys = torch.arange(last + 1, 0, -1, device=self.mask.device)
        reaches = {_reach(self.function, query, keys[last - query :]) for query in (FAR, FAR + 1, last)}
        return reaches.pop() if len(reaches) == 1 else None


_noted: ContextVar[list[NotedMask] | None] = ContextVar("posenc_masks", default=None)


def posenc_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Make the bool mask that transformers makes for sdpa; while the probe runs, also make those it would skip."""
    from transformers.masking_utils import sdpa_mask

    masks = None if torch.compiler.is_compiling() else _noted.get()
    if masks is None:
        optional: Tensor | None = sdpa_mask(*args, **kwargs)
        return optional
    mask: Tensor = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    masks.append(NotedMask(mask, kwargs.get("mask_function")))
    return mask


@contextmanager
def noted_masks() -> Iterator[list[NotedMask]]:
    """Note every mask that is made inside the block, in this thread, with the function that defines it."""
    masks: list[NotedMask] = []
    token = _noted.set(masks)
    try:
        yield masks
    finally:
        _noted.reset(token)


def measured_window(mask: Tensor | None, masks: list[NotedMask], declared: int | None, where: str) -> int | None:
    """Return the sliding window of the mask that reached a layer, in tokens, or None for plain causal attention.

    Parameters
    ----------
    mask : Tensor or None
        The mask that reached the layer's attention function.
    masks : list of NotedMask
        The masks that were made in this forward.
    declared : int or None
        The sliding window that the layer passes to its attention function.
    where : str
        Name of the layer, for messages.

    Raises
    ------
    UnsupportedModelError
        If the mask allows other keys than the last ones, or another number of them than the layer declares.
    """
    if mask is None:
        return declared
    storage = mask.untyped_storage().data_ptr()
    noted = next((noted for noted in masks if noted.mask.untyped_storage().data_ptr() == storage), None)
    if noted is None:
        raise UnsupportedModelError(
            f"{where}: its mask is not made by transformers' mask functions, so it may hide keys (sparse or block "
            "attention) in ways a remap would ignore."
        )
    if noted.reach is None:
        raise UnsupportedModelError(
            f"{where}: its mask is not a sliding window of fixed width (chunked or block attention), and plans know "
            "only causal and sliding attention."
        )
    window = None if noted.reach == FAR else noted.reach
    if declared is not None and window is not None and declared != window:
        raise UnsupportedModelError(
            f"{where}: its mask reaches {window} tokens, but it declares a window of {declared}."
        )
    return window


def _reach(function: Any, query: int, keys: Tensor) -> int | None:
    """Count how many of the last ``FAR`` tokens a query sees; None if they are not the last ones, or include the next.

    ``keys`` are the indices ``query + 1``, ``query``, ... down to the first of these tokens, or further.
    """
    key = keys[: FAR + 1]
    zero = torch.zeros((), dtype=torch.long, device=key.device)
    try:
        seen = torch.as_tensor(function(zero, zero, torch.tensor(query, device=key.device), key)).expand(key.shape)
    except (IndexError, RuntimeError, TypeError):  # the function only knows the tokens of this forward
        return None
    count = int(seen[1:].count_nonzero())  # ten times as fast as a sum of bools
    return count if not bool(seen[0]) and int(seen[1 : 1 + count].count_nonzero()) == count else None
