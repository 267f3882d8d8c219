"""Dense attention in float64, O(L^2): slow and obviously right. All other backends are compared with it.

Shape letters: B batch, H query heads, L queries or keys, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posenc.backend import AttentionBackend, BackendCapabilities
from posenc.plan import PositionPlan
from posenc.rope import Rotary
from posenc.segment import Positions, Segment

ROWS = 256
"""Queries handled at a time."""


class ReferenceBackend(AttentionBackend):
    """Every segment's logits in float64, one softmax over all of them."""

    name = "reference"
    summary = "dense float64 attention, O(L^2) work: the judge of every other backend"
    capabilities = BackendCapabilities(
        devices=("cpu", "cuda"),
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        gradients=True,
        masks=True,
        softcap=True,
        lse_gradients=True,
        logit_interpolation=True,
    )
    priority = -100

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
        """A block of queries at a time, so that memory grows with the length and not with its square."""
        q_len, first = q_BHLD.shape[2], k_BHLD.shape[2] - q_BHLD.shape[2]
        outs, lses = [], []
        for low in range(0, q_len, ROWS):
            high = min(low + ROWS, q_len)
            keys = slice(0, first + high)
            block_mask = None if mask is None else mask[:, :, low:high, keys]
            q, k, v = q_BHLD[:, :, low:high], k_BHLD[:, :, keys], v_BHLD[:, :, keys]
            out, lse = _attend_block(q, k, v, plan.prefix(first + high), rotary, scale, block_mask, softcap)
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 2), torch.cat(lses, 2)


def _attend_block(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    plan: PositionPlan,
    rotary: Rotary,
    scale: float,
    mask: Tensor | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The plan's last queries against all of its keys."""
    groups = q_BHLD.shape[1] // k_BHLD.shape[1]
    q, k, v = q_BHLD.double(), k_BHLD.double(), v_BHLD.double()
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q_len, k_len = q.shape[2], k.shape[2]
    first = k_len - q_len
    key_index = torch.arange(k_len, device=q.device)
    logits = torch.full((*q.shape[:3], k_len), float("-inf"), dtype=torch.float64, device=q.device)
    attended = torch.zeros(q_len, k_len, dtype=torch.bool, device=q.device)
    for segment in plan.segments:
        start, stop = (torch.from_numpy(b[first:].copy()).to(q.device) for b in (segment.key_start, segment.key_stop))
        inside = (key_index >= start[:, None]) & (key_index < stop[:, None])
        rotated_q = _rotate(rotary, q, segment, segment.query_positions[first:])
        rotated_k = _rotate(rotary, k, segment, segment.key_positions)
        logits = torch.where(inside, rotated_q @ rotated_k.transpose(-1, -2), logits)
        attended |= inside
    if plan.query_scale is not None:
        logits = logits * torch.from_numpy(plan.query_scale[first:].copy()).to(q.device)[:, None]
    allowed = attended if mask is None else attended & mask
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~allowed, float("-inf"))
    lse = torch.logsumexp(logits, -1)
    weights = (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return (weights @ v).to(q_BHLD.dtype), lse.float()


def _rotate(rotary: Rotary, x: Tensor, segment: Segment, positions: Positions) -> Tensor:
    cos, sin = rotary.tables(positions, interpolation=segment.interpolation, dtype=torch.float64, device=x.device)
    return rotary.rotate(x, cos, sin)
