"""Attention kernels alone: the tensors are rotated before the clock starts, so only the kernel is timed.

A fused remap is compared with these: the time of the attention itself, without rotation or segments. torch's flash
attention is the reference point; cuDNN's is the other kernel that the same torch call could run.

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
class KernelCall:
    """A call of one kernel on rotated tensors."""

    kernel: Callable[..., Tensor]
    q_BHLD: Tensor
    k_BHLD: Tensor
    v_BHLD: Tensor
    causal: bool

    def __call__(self) -> Tensor:
        return self.kernel(self.q_BHLD, self.k_BHLD, self.v_BHLD, causal=self.causal)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Call cuDNN's attention, even if torch would choose another kernel."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def baselines(pair: Pair) -> tuple[Sides, dict[str, str]]:
    """Find the kernels that can run a case, by calling each once.

    Returns
    -------
    (mapping of str to callable, dict of str to str)
        The calls of the kernels that can run it, and why the others cannot; both are empty for a whole model.
    """
    if not isinstance(pair.plain, PlainAttention | PlainQuery):
        return {}, {}
    rotated = pair.plain.rotated()
    causal = isinstance(pair.plain, PlainAttention)
    calls = {
        name: KernelCall(kernel, *rotated, causal=causal)
        for name, kernel in ((FLASH, flash_attention), (CUDNN, cudnn_attention))
    }
    reasons = {name: _refusal(call) for name, call in calls.items()}
    usable = {name: call for name, call in calls.items() if reasons[name] is None}
    return usable, {name: reason for name, reason in reasons.items() if reason is not None}


def _refusal(call: Callable[[], Tensor]) -> str | None:
    """Why a call fails, or None: torch gives the reason in warnings before the error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except RuntimeError as error:
            messages = [str(warning.message).splitlines()[0] for warning in caught]
            return "; ".join(dict.fromkeys([*messages, str(error).splitlines()[0]]))
    return None
