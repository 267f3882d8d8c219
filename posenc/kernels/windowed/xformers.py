"""The backend ``xformers``: windowed calls of xformers' memory-efficient attention, merged by its own kernel.

Install it with ``pip install 'posenc[gpu]'``. Half precision runs ``memory_efficient_attention_partial`` and
``merge_attentions``. float32, which partial does not take, runs the CUTLASS forward, which returns its logsumexp as
well. Neither has a backward pass that knows of the merge. xformers 0.0.35 is the last release that holds this code;
later ones take it from the package ``mslk``.

Shape letters: B batch, H heads, G key/value heads, R queries and K keys of one call, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from posenc.kernels.windowed.backend import ALIGNMENT, OutLse, WindowedBackend
from posenc.kernels.windowed.xformers_library import find_fmha, operators_problem


class XformersBackend(WindowedBackend):
    """One xformers call per band, merged by its own kernel."""

    name = "xformers"
    summary = "xformers' memory-efficient attention on windows, merged by its own kernel"
    capabilities = replace(WindowedBackend.capabilities, dtypes=(torch.float32, torch.bfloat16, torch.float16))
    priority = 20

    @property
    def fmha(self) -> Any:
        """The library's attention module."""
        return find_fmha()[0]

    def unavailable(self, q_BHLD: Tensor) -> str | None:
        """Also where xformers is not installed, cannot load its operators, or does not support the dtype here."""
        if self.fmha is None:
            return f"xformers' attention is not installed ({find_fmha()[1]}): pip install 'posenc[gpu]'"
        if self.fmha.__name__.startswith("xformers.") and operators_problem() is not None:
            return operators_problem()
        return _unsupported(self.fmha, q_BHLD.dtype, q_BHLD.device)

    def window(
        self, q_BRHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, *, left: int | None, right: int | None, scale: float
    ) -> OutLse:
        if q_BRHD.dtype == torch.float32 and left is not None and right is None:
            # CUTLASS knows no window that is open to the right: in reverse order, it is a causal one.
            reversed_tensors = (x.flip(1) for x in (q_BRHD, k_BKHD, v_BKHD))
            out, lse = self.window(*reversed_tensors, left=None, right=0, scale=scale)
            return out.flip(1), lse.flip(2)
        groups = k_BKHD.shape[2]
        q = q_BRHD.view(*q_BRHD.shape[:2], groups, -1, q_BRHD.shape[3])
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, q.shape[3], -1) for x in (k_BKHD, v_BKHD))
        bias = _bias(self.fmha.attn_bias, left, right, q.shape[1] + k.shape[1])
        if q.dtype == torch.float32:
            cutlass = self.fmha.cutlass.FwOp
            run = self.fmha.memory_efficient_attention_forward_requires_grad
            out, lse = run(q, k, v, attn_bias=bias, scale=scale, op=cutlass)
        else:
            out, lse = self.fmha.memory_efficient_attention_partial(q, k, v, attn_bias=bias, scale=scale)
        return out.flatten(2, 3), lse.flatten(1, 2)[..., : q.shape[1]]  # CUTLASS rounds the logsumexp's length up

    def merged(self, parts: Sequence[OutLse]) -> OutLse:
        outs, lses = zip(*parts, strict=True)
        out, lse = self.fmha.merge_attentions(list(outs), list(lses))
        return out, lse


def _bias(attn_bias: Any, left: int | None, right: int | None, unlimited: int) -> Any:
    """A window as the library's attention bias; ``unlimited`` is wider than any."""
    if left is None:
        return None if right is None else attn_bias.LowerTriangularFromBottomRightMask()
    if right is None:
        return attn_bias.LocalAttentionFromBottomRightMask(window_left=left, window_right=unlimited)
    return attn_bias.LowerTriangularFromBottomRightLocalAttentionMask(left + 1)


@cache
def _unsupported(fmha: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the library does not support a dtype on a device, in its own words."""
    op = fmha.cutlass.FwOp if dtype == torch.float32 else fmha.flash.FwOp
    sample = torch.zeros(1, 1, 1, ALIGNMENT, dtype=dtype, device=device)
    partial = dtype != torch.float32
    reasons = op.not_supported_reasons(fmha.common.Inputs(sample, sample, sample, is_partial=partial))
    return f"xformers refuses: {'; '.join(reasons)}" if reasons else None
