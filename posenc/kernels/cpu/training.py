"""Attention with gradients on torch's CPU flash operator.

Torch's autograd does not follow the operator's logsumexp and would silently ignore it. So the backward pass here calls
the operator's own backward for every tile, with the merged output and logsumexp, which is exact. A gradient that
reaches the logsumexp is one more channel of that call.

Shape letters: B batch, H heads, G batch rows x heads, N blocks of a tile, L tokens, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posenc.kernels.cpu.calls import FlashCall, FlashCalls, flash_calls, masked_calls
from posenc.kernels.cpu.flash_operator import flash_backward, pad
from posenc.kernels.cpu.prefill import attend_tile
from posenc.kernels.rotated import compute_dtype, rotated_keys, rotated_queries, rotation_layout
from posenc.plan import PositionPlan
from posenc.rope import Rotary


def attend_with_gradients(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    plan: PositionPlan,
    rotary: Rotary,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp that autograd can follow: every rotated copy is held for the backward pass."""
    if mask is not None and q_BHLD.shape[0] > 1:  # every batch row has calls of its own
        rows = [
            attend_with_gradients(q, k, v, plan, rotary, scale, row_mask)
            for q, k, v, row_mask in zip(*(torch.split(x, 1) for x in (q_BHLD, k_BHLD, v_BHLD, mask)), strict=True)
        ]
        out, lse = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
        return out, lse
    layout, width = rotation_layout(plan, q_BHLD.shape[2]), v_BHLD.shape[-1]
    calls = flash_calls(plan, q_BHLD.shape[2]) if mask is None else masked_calls(plan, mask)
    queries = [rotated_queries(copy, q_BHLD, rotary) for copy in layout.queries]
    keys = [rotated_keys(copy, k_BHLD, rotary) for copy in layout.keys]
    copies = [pad(x.flatten(0, 1), width) for x in (*queries, *keys)]
    run: Any = _FlashTiles.apply
    shape = (q_BHLD.shape[0] * q_BHLD.shape[1], q_BHLD.shape[2], width)
    out_GLD, lse_GL = run(calls, shape, scale, v_BHLD.flatten(0, 1), *copies)
    return out_GLD.unflatten(0, q_BHLD.shape[:2]), lse_GL.unflatten(0, q_BHLD.shape[:2])


class _FlashTiles(torch.autograd.Function):
    """All calls of one attention; gradients for the values and for every rotated copy."""

    @staticmethod
    def forward(
        ctx: Any, calls: FlashCalls, shape: tuple[int, ...], scale: float, v: Tensor, *copies: Tensor
    ) -> tuple[Tensor, Tensor]:
        queries, keys = copies[: len(calls.by_segment)], copies[len(calls.by_segment) :]
        merged = torch.zeros(shape, dtype=compute_dtype(v), device=v.device)
        lse = torch.full(shape[:2], float("-inf"), dtype=merged.dtype, device=v.device)
        for segment_queries, segment_calls in zip(queries, calls.by_segment, strict=True):
            for call in segment_calls:
                attend_tile(call, segment_queries, keys[call.key_copy], v, merged, lse, scale)
        out = merged.to(v.dtype)
        ctx.save_for_backward(v, out, lse, *copies)
        ctx.calls, ctx.scale = calls, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        v, out, lse, *copies = ctx.saved_tensors
        segments, width = len(ctx.calls.by_segment), v.shape[-1]
        grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
        if grads[1] is not None:
            # The gradient of a logit is p * (grad_out @ v - grad_out @ out + grad_lse). A channel that is 1 in the
            # values and 0 in the output, with grad_lse for its gradient, adds the last term and nothing else.
            grad_out = torch.cat((grad_out, grads[1][..., None].to(grad_out.dtype)), -1)
            v, (out, *copies) = F.pad(v, (0, 1), value=1.0), [pad(x, width + 1) for x in (out, *copies)]
        sums = [torch.zeros_like(x, dtype=lse.dtype) for x in (v, *copies)]
        lse = lse.masked_fill(lse == float("-inf"), 0.0)  # rows without any key: weights exp(-inf - 0) = 0
        for segment, segment_calls in enumerate(ctx.calls.by_segment):
            for call in segment_calls:
                queries, keys = copies[segment], copies[segments + call.key_copy]
                grad_queries, grad_keys, grad_values = flash_backward(
                    call.rows(grad_out),
                    call.queries(queries),
                    call.keys(keys),
                    call.values(v),
                    call.rows(out),
                    call.rows(lse[..., None])[..., 0],
                    0.0,
                    call.is_causal,
                    attn_mask=call.bias(queries.dtype),
                    scale=ctx.scale,
                )
                _add(call.queries(sums[1 + segment]), grad_queries, call)
                _add(call.keys(sums[1 + segments + call.key_copy]), grad_keys, call)
                _add(call.values(sums[0]), grad_values, call)
        dtyped = [s[..., :width].to(x.dtype) for s, x in zip(sums, (v, *copies), strict=True)]
        return None, None, None, *dtyped


def _add(target_NGLD: Tensor, part_NGLD: Tensor, call: FlashCall) -> None:
    """Add to views whose blocks may overlap: as many tokens at a time as the blocks are apart."""
    length = target_NGLD.shape[2]
    step = call.tile.step if call.tile.count > 1 else length
    for low in range(0, length, step):
        rows = slice(low, low + step)
        target_NGLD[:, :, rows].add_(part_NGLD[:, :, rows])
