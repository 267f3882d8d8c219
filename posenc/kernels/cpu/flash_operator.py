"""Torch's CPU flash operator, and tensors as it reads them.

It returns the logsumexp, which ``scaled_dot_product_attention`` does not.

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def adjacent(x_BHLD: Tensor) -> Tensor:
    """The tensor, or a copy whose channels lie side by side: the operator reads them so, whatever their stride."""
    *others, channel = x_BHLD.stride()
    # A smaller stride than the channels take would become the innermost one when the tensor is rotated.
    whole = channel == 1 and all(stride == 0 or stride >= x_BHLD.shape[-1] for stride in others)
    return x_BHLD if whole else x_BHLD.contiguous()


def pad(x: Tensor, width: int) -> Tensor:
    """Zero channels up to ``width``: the operator wants one head_dim for query, key and value."""
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
