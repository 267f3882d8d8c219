"""What kernels work out once and keep on plans, segments and their parts."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")

MOST = 16
"""Entries of a memo: frequencies that follow the length come anew with every token, and each has its tables."""


def remembered(memo: dict[Any, Any], key: Hashable, make: Callable[[], Made]) -> Made:
    """What is in the memo under a key; made where it is missing, and then the oldest entries make room.

    It is made outside of autograd and of ``torch.inference_mode()``: tensors that are born there can never take part
    in a backward pass, and what is kept outlives the mode of its first use.
    """
    try:
        found: Made = memo[key]
    except KeyError:
        with torch.inference_mode(False), torch.no_grad():
            found = make()
        for old in list(memo)[: max(0, len(memo) + 1 - MOST)]:
            memo.pop(old, None)
        memo[key] = found
    return found
