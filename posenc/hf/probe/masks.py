"""The mask function registered with transformers, and what the masks it makes allow, measured."""

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
"""Query index at which a mask's reach is measured: beyond every sliding window."""


@dataclass
class NotedMask:
    """A mask and the function that says what it allows."""

    mask: Tensor
    function: Any

    @cached_property
    def reach(self) -> int | None:
        """Width of the sliding window, ``FAR`` for plain causal attention, None for anything else."""
        most = FAR + 7
        keys = torch.arange(most + 1, 0, -1, device=self.mask.device)
        reaches = {_reach(self.function, query, keys[most - query :]) for query in (FAR, FAR + 1, most)}
        return reaches.pop() if len(reaches) == 1 else None


_log: ContextVar[list[NotedMask] | None] = ContextVar("posenc_masks", default=None)


def posenc_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' bool masks; while the probe listens, every one is made and noted."""
    from transformers.masking_utils import sdpa_mask

    log = None if torch.compiler.is_compiling() else _log.get()
    if log is None:
        mask: Tensor | None = sdpa_mask(*args, **kwargs)
        return mask
    made: Tensor = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    log.append(NotedMask(made, kwargs.get("mask_function")))
    return made


@contextmanager
def logged_masks() -> Iterator[list[NotedMask]]:
    """Note every mask that is made inside, with the function that says what it allows."""
    found: list[NotedMask] = []
    token = _log.set(found)
    try:
        yield found
    finally:
        _log.reset(token)


def measured_window(mask: Tensor | None, log: list[NotedMask], declared: int | None, where: str) -> int | None:
    """The sliding window of the mask that reached a layer, or None for plain causal attention.

    Raises
    ------
    UnsupportedModelError
        If the mask allows anything else than the last tokens.
    """
    if mask is None:
        return declared
    storage = mask.untyped_storage().data_ptr()
    noted = next((noted for noted in log if noted.mask.untyped_storage().data_ptr() == storage), None)
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
    """How many of the last ``FAR`` tokens a query sees; None if they are not the last ones, or include the next.

    ``keys`` are the indices ``query + 1``, ``query``, .. down to the first token of these at least.
    """
    key = keys[: FAR + 1]
    zero = torch.zeros((), dtype=torch.long, device=key.device)
    try:
        seen = torch.as_tensor(function(zero, zero, torch.tensor(query, device=key.device), key)).expand(key.shape)
    except (IndexError, RuntimeError, TypeError):  # a pattern made for these very tokens
        return None
    count = int(seen[1:].count_nonzero())  # ten times as fast as a sum of bools
    return count if not bool(seen[0]) and int(seen[1 : 1 + count].count_nonzero()) == count else None
