"""Memory layouts of tensors that may be passed to attention.

Every entry makes a tensor of the same shape, and of the same values unless it repeats some. Memory between the values
holds NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def _of_a_larger(x: Tensor) -> Tensor:
    larger = torch.full((*x.shape[:2], x.shape[2] + 9, x.shape[3] + 4), torch.nan, device=x.device).to(x.dtype)
    larger[:, :, 5:-4, :-4] = x
    return larger[:, :, 5:-4, :-4]


def _every_second(x: Tensor) -> Tensor:
    larger = torch.full([2 * size for size in x.shape], torch.nan, device=x.device).to(x.dtype)
    larger[::2, ::2, ::2, ::2] = x
    return larger[::2, ::2, ::2, ::2]


def _permuted(*order: int) -> Callable[[Tensor], Tensor]:
    """A layout in which the dimensions have this order in memory, outermost first."""
    inverse = [order.index(dimension) for dimension in range(4)]
    return lambda x: x.permute(order).contiguous().permute(inverse)


def _overlapping(x: Tensor) -> Tensor:
    """Channels and tokens both have stride 1, as in the windows that ``unfold`` makes."""
    line = x.flatten()[: x.shape[2] + x.shape[3] - 1]
    return line.unfold(0, x.shape[3], 1)[: x.shape[2]].expand(x.shape)


LAYOUTS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "with tokens inside of channels": _permuted(0, 1, 3, 2),
    "with tokens outside of heads, as projections make them": _permuted(0, 2, 1, 3),
    "with heads inside of channels": _permuted(0, 2, 3, 1),
    "with the batch innermost": _permuted(3, 2, 1, 0),
    "as part of a larger tensor": _of_a_larger,
    "with a step in every dimension": _every_second,
    "expanded over rows": lambda x: x[:1].expand(x.shape),
    "expanded over heads": lambda x: x[:, :1].expand(x.shape),
    "expanded over tokens": lambda x: x[:, :, :1].expand(x.shape),
    "expanded over channels": lambda x: x[..., :1].expand(x.shape),
    "in windows that overlap": _overlapping,
}
