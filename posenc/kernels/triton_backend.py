"""The fused Triton kernels as a backend: all segments of a plan share one online softmax.

Triton itself is imported on first use.

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from posenc.backend import AttentionBackend, BackendCapabilities
from posenc.plan import PositionPlan
from posenc.rope import Rotary

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs kernels on the CPU, slowly: it proves them right. Read once, as Triton does."""

MOST_CHANNELS = 256

DECODE_QUERIES = 16
"""Up to this many queries the keys are read raw; for more, rotating them beforehand is paid back."""


class TritonBackend(AttentionBackend):
    """Prefill over keys rotated beforehand; decoding over raw keys, split, rotated on read."""

    name = "triton"
    summary = "fused Triton kernels: every segment of a plan in one pass over the keys"
    capabilities = BackendCapabilities(
        devices=("cuda", "cpu") if INTERPRETED else ("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        gradients=False,
        masks=False,
        softcap=True,
    )
    priority = -200 if INTERPRETED else 5

    def refuses(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None) -> str | None:
        """Also where triton is not installed or heads are too wide."""
        widest = max(q_BHLD.shape[-1], v_BHLD.shape[-1])
        if not _installed():
            return "triton is not installed (Linux: pip install 'posenc[triton]')"
        if widest > MOST_CHANNELS:
            return f"it takes heads of at most {MOST_CHANNELS} channels, not {widest}"
        return super().refuses(q_BHLD, k_BHLD, v_BHLD, mask)

    def attend(
        self,
        q_BHLD: Tensor,
        k_BHLD: Tensor,
        v_BHLD: Tensor,
        plan: PositionPlan,
        rotary: Rotary,
        *,
        scale: float,
        mask: Tensor | None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        rotary.check_width(q_BHLD.shape[-1])
        batch, heads, q_len, _ = q_BHLD.shape
        device = q_BHLD.device
        # Laid out as models want the output: [B, L, H, D].
        out_BHLD = q_BHLD.new_empty(batch, q_len, heads, v_BHLD.shape[-1]).transpose(1, 2)
        lse_BHL = q_BHLD.new_empty(batch, heads, q_len, dtype=torch.float32)
        first = plan.total - q_len
        if not any(bool((s.key_stop[first:] > s.key_start[first:]).any()) for s in plan.segments):
            return out_BHLD.zero_(), lse_BHL.fill_(float("-inf"))
        from posenc.kernels.triton_decode import decode
        from posenc.kernels.triton_plan import Scales, decode_tables, prefill_tables
        from posenc.kernels.triton_prefill import prefill

        tensors = (q_BHLD, k_BHLD, v_BHLD, out_BHLD, lse_BHL)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if q_len <= DECODE_QUERIES:
                decode(*tensors, decode_tables(plan, q_len, rotary, device), rotary, Scales.of(scale, softcap))
            else:
                prefill(*tensors, prefill_tables(plan, q_len, rotary, device), rotary, Scales.of(scale, softcap))
        return out_BHLD, lse_BHL


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
