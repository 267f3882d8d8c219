"""One query per batch row on torch's CPU flash operator: what every layer runs for a decoded token.

Shape letters: B batch, H heads, C calls, R query heads of a key/value head, L tokens, D head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posenc.kernels.cpu.decode_calls import DecodeCalls, decode_calls
from posenc.kernels.cpu.flash_operator import flash, pad
from posenc.kernels.merge import merge_all
from posenc.kernels.rotated import checked, compute_dtype
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.plan import PositionPlan
from posenc.rope import Rotary


def decode(
    q_BH1D: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    plan: PositionPlan,
    rotary: Rotary,
    scale: float,
    kept: RotatedKeyCache | None,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of the plan's last query.

    The query heads of a key/value head are the rows of one call, so that keys are read once.
    """
    batch, heads, _, _ = q_BH1D.shape
    key_heads, width = k_BHLD.shape[1], v_BHLD.shape[-1]
    plan_calls = decode_calls(plan, rotary, q_BH1D, k_BHLD, scale)
    if not plan_calls.calls:
        lse = q_BH1D.new_full((batch, heads, 1), -math.inf, dtype=compute_dtype(q_BH1D))
        return q_BH1D.new_zeros((batch, heads, 1, width)), lse
    frames = [pad(frame.rotated(k_BHLD, kept), width) for frame in plan_calls.frames]
    shape = (-1, batch, key_heads, heads // key_heads, width)
    queries_CBHRD = pad(_rotated_query(plan_calls, q_BH1D, rotary), width).view(shape)
    parts = [
        flash(
            q_BHRD.expand(call.num_splits * batch, -1, -1, -1),
            call.keys(frames),
            call.values(v_BHLD),
            attn_mask=call.bias,
            scale=1.0,
        )
        for q_BHRD, call in zip(queries_CBHRD.unbind(), plan_calls.calls, strict=True)
    ]
    out, lse = parts[0] if len(parts) == 1 else (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    if len(out) > batch:
        out, lse = merge_all(out.view(shape), lse.view(shape[:-1]))
    return out.reshape(batch, heads, 1, width), lse.reshape(batch, heads, 1)


def _rotated_query(plan_calls: DecodeCalls, q_BH1D: Tensor, rotary: Rotary) -> Tensor:
    """The query as every call sees it, times the logits' scale, [C, B, H, 1, D]."""
    q = q_BH1D if plan_calls.factor is None else q_BH1D.to(plan_calls.cos.dtype) * plan_calls.factor
    q_CBH1D = q.expand(len(plan_calls.cos), -1, -1, -1, -1)
    rotated_CBH1D = rotary.rotate(q_CBH1D, plan_calls.cos, plan_calls.sin)
    return checked(rotated_CBH1D.to(q_BH1D.dtype), q_BH1D, "query")
