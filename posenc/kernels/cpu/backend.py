"""The backend ``cpu_flash``: torch's CPU flash operator on the parts of segments, merged by logsumexp.

One attention takes one of three paths: gradients, a single query per batch row, or neither.

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posenc.backend import AttentionBackend, BackendCapabilities, needs_gradient
from posenc.kernels.cpu.decode import decode
from posenc.kernels.cpu.flash_operator import adjacent, pad
from posenc.kernels.cpu.prefill import prefill
from posenc.kernels.cpu.training import attend_with_gradients
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.plan import PositionPlan
from posenc.rope import Rotary


class CpuFlashBackend(AttentionBackend):
    """Few large calls of the CPU flash operator, one per rectangle or triangle of a segment."""

    name = "cpu_flash"
    summary = "torch's CPU flash operator on rectangles and triangles, merged by logsumexp"
    capabilities = BackendCapabilities(
        devices=("cpu",),
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        gradients=True,
        masks=True,
        lse_gradients=True,
        logit_interpolation=True,
        keeps_keys=True,
    )
    priority = 10

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
        kept: RotatedKeyCache | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        value_dim, width = v_BHLD.shape[-1], max(q_BHLD.shape[-1], v_BHLD.shape[-1])
        q_BHLD, k_BHLD, v_BHLD = adjacent(q_BHLD), adjacent(k_BHLD), pad(adjacent(v_BHLD), width)
        if needs_gradient(q_BHLD, k_BHLD, v_BHLD):
            out_BHLD, lse_BHL = attend_with_gradients(q_BHLD, k_BHLD, v_BHLD, plan, rotary, scale, mask)
        elif q_BHLD.shape[2] == 1 and mask is None:
            out_BHLD, lse_BHL = decode(q_BHLD, k_BHLD, v_BHLD, plan, rotary, scale, kept)
        else:
            out_BHLD, lse_BHL = prefill(q_BHLD, k_BHLD, v_BHLD, plan, rotary, scale, mask)
        return out_BHLD[..., :value_dim], lse_BHL.float()
