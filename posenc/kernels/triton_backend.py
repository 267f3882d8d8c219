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

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Triton's interpreter runs kernels on the CPU, slowly: it proves them right. Read once, and as Triton does."""

MOST_CHANNELS = 256
MOST_HEADS = 65535
"""What the second axis of a CUDA grid holds."""

DECODE_QUERIES = 16
"""Up to this many queries the keys are read raw; for more, rotating them beforehand is paid back."""


class TritonBackend(AttentionBackend):
    """Prefill over keys rotated beforehand; decoding over raw keys, split, rotated on read."""

    name = "triton"
    summary = "fused Triton kernels: every segment of a plan in one pass over the keys"
    capabilities = BackendCapabilities(
        devices=("cpu",) if INTERPRETED else ("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        gradients=False,
        masks=False,
        softcap=True,
    )
    priority = -200 if INTERPRETED else 5

    def refuses(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None) -> str | None:
        """Also where triton is not installed or heads are too wide."""
        reason = super().refuses(q_BHLD, k_BHLD, v_BHLD, mask)
        if reason is not None:
            return reason
        widest, heads = max(q_BHLD.shape[-1], v_BHLD.shape[-1]), q_BHLD.shape[0] * q_BHLD.shape[1]
        if widest > MOST_CHANNELS:
            return f"it takes heads of at most {MOST_CHANNELS} channels, not {widest}"
        if heads > MOST_HEADS:
            return f"it takes at most {MOST_HEADS} heads of all batch rows together, not {heads}"
        if not _installed():
            return "triton is not installed (Linux: pip install 'posenc[triton]')"
        return _unsuited(q_BHLD.device) if q_BHLD.device.type == "cuda" else None

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
        from posenc.kernels.triton_decode import decode
        from posenc.kernels.triton_plan import Scales, decode_tables, prefill_tables
        from posenc.kernels.triton_prefill import prefill

        tensors, scales = (q_BHLD, k_BHLD, v_BHLD, out_BHLD, lse_BHL), Scales.of(scale, softcap)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            if q_len <= DECODE_QUERIES:
                raw = decode_tables(plan, q_len, rotary, device)
                if raw is not None:
                    decode(*tensors, raw, rotary, scales)
                    return out_BHLD, lse_BHL
            else:
                rotated = prefill_tables(plan, q_len, rotary, device)
                if rotated is not None:
                    prefill(*tensors, rotated, rotary, scales)
                    return out_BHLD, lse_BHL
        return out_BHLD.zero_(), lse_BHL.fill_(float("-inf"))


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _unsuited(device: torch.device) -> str | None:
    """Why the kernels do not fit this GPU, if they do not."""
    if torch.version.hip is not None:
        return "its tiles are made for NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0 or newer, and {device} has {major}.{minor}"
