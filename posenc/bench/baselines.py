"""Attention kernels alone: the tensors are rotated beforehand, and nothing but the kernel is timed.

What a fused remap is held against: whatever it does beyond plain attention, this is the time that attention itself
takes. torch's flash attention is the anchor; cuDNN's is what else the same call could run.

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from posenc.bench.attention import PlainAttention, PlainQuery, flash_attention
from posenc.bench.cases import CUDNN, FLASH
from posenc.bench.timing import Pair, Sides


@dataclass(frozen=True, eq=False)
class Alone:
    """A kernel on rotated tensors."""

    kernel: Callable[..., Tensor]
    q_BHLD: Tensor
    k_BHLD: Tensor
    v_BHLD: Tensor
    causal: bool

    def __call__(self) -> Tensor:
        return self.kernel(self.q_BHLD, self.k_BHLD, self.v_BHLD, causal=self.causal)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """cuDNN's attention, whatever else torch would choose."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def baselines(pair: Pair) -> tuple[Sides, dict[str, str]]:
    """The kernels that can run a case, called once, and why the others cannot; nothing for a whole model."""
    if isinstance(pair.plain, PlainAttention | PlainQuery):
        rotated = pair.plain.rotated()
    else:
        return {}, {}
    found, refused = {}, {}
    for name, kernel in ((FLASH, flash_attention), (CUDNN, cudnn_attention)):
        call = Alone(kernel, *rotated, causal=isinstance(pair.plain, PlainAttention))
        reason = _reason(call)
        if reason is None:
            found[name] = call
        else:
            refused[name] = reason
    return found, refused


def _reason(call: Callable[[], Tensor]) -> str | None:
    """Why a call cannot be made: torch says it in warnings before the error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            call()
        except RuntimeError as error:
            words = [str(warning.message).splitlines()[0] for warning in said]
            return "; ".join(dict.fromkeys([*words, str(error).splitlines()[0]]))
    return None
