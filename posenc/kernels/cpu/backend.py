"""Segments on torch's CPU flash operator, merged by logsumexp.

The operator returns its logsumexp but no gradient through it, and torch's autograd would silently
ignore that; so the backward pass here calls the operator's own backward for every tile with the
merged output and logsumexp, which is exact. A gradient that reaches the logsumexp is one more
channel of that call.

Batch rows and heads are one axis here: the operator finds the key/value head of a query head by
division, which holds across rows too.

Shape letters: B batch, H heads, G batch rows x heads, N blocks of a tile, L tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posenc.backend import AttentionBackend, BackendCapabilities
from posenc.kernels.cpu.calls import Call, Calls, masked_calls, plan_calls
from posenc.kernels.cpu.decode import adjacent, attend_one, flash, pad
from posenc.kernels.merge import merge_into
from posenc.kernels.rotated import compute_dtype, layout, rotated_keys, rotated_queries
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.plan import PositionPlan
from posenc.rope import Rotary

flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

CHUNK_BYTES = 16 * 2**20
"""Heads are done in groups whose queries take about this much: memory below malloc's 32 MiB limit for
mappings of their own is used again, while fresh pages cost more than the rotation of what they hold."""

BLOCK_BYTES = 4 * 2**20
"""Outputs of batched blocks that wait to be merged: small enough to be merged while they are in the cache."""


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
        training = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHLD, k_BHLD, v_BHLD))
        if training:
            out_BHLD, lse_BHL = _with_gradients(q_BHLD, k_BHLD, v_BHLD, plan, rotary, scale, mask)
        elif q_BHLD.shape[2] == 1 and mask is None:
            out_BHLD, lse_BHL = attend_one(q_BHLD, k_BHLD, v_BHLD, plan, rotary, scale, kept)
        else:
            out_BHLD, lse_BHL = _many_queries(q_BHLD, k_BHLD, v_BHLD, plan, rotary, scale, mask)
        return out_BHLD[..., :value_dim], lse_BHL.float()


def _many_queries(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    plan: PositionPlan,
    rotary: Rotary,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Tile by tile, a chunk of rows and heads at a time, straight into the output."""
    batch, heads, q_len, _ = q_BHLD.shape
    width, arranged = v_BHLD.shape[-1], layout(plan, q_len)
    group, parts = heads // k_BHLD.shape[1], list(_parts(q_BHLD, k_BHLD, alone=mask is not None))
    if parts[0][0] == slice(0, 1):  # as [B, L, H, D] in memory: that is how models read it, and the operator writes
        out_BHLD = q_BHLD.new_empty((batch, q_len, heads, width)).transpose(1, 2)
    else:
        out_BHLD = q_BHLD.new_empty((batch, heads, q_len, width))
    lse_BHL = q_BHLD.new_empty((batch, heads, q_len), dtype=compute_dtype(q_BHLD))
    for row, key_heads in parts:
        query_heads = slice(key_heads.start * group, key_heads.stop * group)
        q, k, v = q_BHLD[row, query_heads], k_BHLD[row, key_heads], v_BHLD[row, key_heads].flatten(0, 1)
        out, lse = (x[row, query_heads].flatten(0, 1) for x in (out_BHLD, lse_BHL))
        merged = out if out.dtype == lse.dtype else torch.empty_like(out, dtype=lse.dtype)
        calls = plan_calls(plan, q_len) if mask is None else masked_calls(plan, mask[row])
        if not calls.complete:
            merged.zero_()
            lse.fill_(float("-inf"))
        keys = [pad(rotated_keys(copy, k, rotary), width).flatten(0, 1) for copy in arranged.copies]
        space = torch.empty_like(q)
        for work, own_calls in zip(arranged.work, calls.by_work, strict=True):
            queries = pad(rotated_queries(work, q, rotary, space), width).flatten(0, 1)
            for call in own_calls:
                _run(call, queries, keys[call.copy], v, merged, lse, scale)
        if merged is not out:
            out.copy_(merged)
    return out_BHLD, lse_BHL


def _parts(q_BHLD: Tensor, k_BHLD: Tensor, *, alone: bool) -> Iterator[tuple[slice, slice]]:
    """Rows and key/value heads that are done together: all rows where they fit into a chunk, else each alone."""
    batch, heads, q_len, dim = q_BHLD.shape
    key_heads = k_BHLD.shape[1]
    head_bytes = heads // key_heads * q_len * dim * q_BHLD.element_size()
    if batch == 1 or alone or batch * key_heads * head_bytes > CHUNK_BYTES:
        together = max(1, min(key_heads, round(CHUNK_BYTES / head_bytes)))
        for row in range(batch):
            for first in range(0, key_heads, together):
                yield slice(row, row + 1), slice(first, min(first + together, key_heads))
    else:
        yield slice(0, batch), slice(0, key_heads)


def _run(call: Call, queries: Tensor, keys: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
    """One tile, merged into the running output and logsumexp [G, L, D] and [G, L], some of its blocks at a time."""
    operands = call.own_rows(queries), call.keys(keys), call.values(v)
    target, target_lse = call.rows(out), call.rows(lse[..., None])[..., 0]
    bias, empty_rows, causal = call.bias(queries.dtype), call.empty_rows(), call.tile.kind == "lower"
    together = max(1, BLOCK_BYTES // (operands[0][0].numel() * out.element_size()))
    for first in range(0, call.tile.count, together):
        blocks = slice(first, first + together)
        new_out, new_lse = flash(*(x[blocks] for x in operands), 0.0, causal, attn_mask=bias, scale=scale)
        if empty_rows is not None:  # the operator reports 0 for rows that attend nothing
            new_lse = new_lse.masked_fill(empty_rows, float("-inf"))
            new_out = new_out.masked_fill(empty_rows[..., None], 0.0)
        merge_into(target[blocks], target_lse[blocks], new_out, new_lse, first=call.first)


def _with_gradients(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    plan: PositionPlan,
    rotary: Rotary,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same tiles, with every rotated copy kept for the backward pass."""
    if mask is not None and q_BHLD.shape[0] > 1:  # every row has its own mask
        rows = [
            _with_gradients(q, k, v, plan, rotary, scale, own)
            for q, k, v, own in zip(*(torch.split(x, 1) for x in (q_BHLD, k_BHLD, v_BHLD, mask)), strict=True)
        ]
        out, lse = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
        return out, lse
    arranged, width = layout(plan, q_BHLD.shape[2]), v_BHLD.shape[-1]
    calls = plan_calls(plan, q_BHLD.shape[2]) if mask is None else masked_calls(plan, mask)
    queries = [rotated_queries(work, q_BHLD, rotary) for work in arranged.work]
    keys = [rotated_keys(copy, k_BHLD, rotary) for copy in arranged.copies]
    copies = [pad(x.flatten(0, 1), width) for x in (*queries, *keys)]
    run: Any = _FlashTiles.apply
    shape = (q_BHLD.shape[0] * q_BHLD.shape[1], q_BHLD.shape[2], width)
    out_GLD, lse_GL = run(calls, shape, scale, v_BHLD.flatten(0, 1), *copies)
    return out_GLD.unflatten(0, q_BHLD.shape[:2]), lse_GL.unflatten(0, q_BHLD.shape[:2])


class _FlashTiles(torch.autograd.Function):
    """All calls of one attention; gradients for the values and every rotated copy."""

    @staticmethod
    def forward(
        ctx: Any, calls: Calls, shape: tuple[int, ...], scale: float, v: Tensor, *copies: Tensor
    ) -> tuple[Tensor, Tensor]:
        queries, keys = copies[: len(calls.by_work)], copies[len(calls.by_work) :]
        merged = torch.zeros(shape, dtype=compute_dtype(v), device=v.device)
        lse = torch.full(shape[:2], float("-inf"), dtype=merged.dtype, device=v.device)
        for rotated, own_calls in zip(queries, calls.by_work, strict=True):
            for call in own_calls:
                _run(call, rotated, keys[call.copy], v, merged, lse, scale)
        out = merged.to(v.dtype)
        ctx.save_for_backward(v, out, lse, *copies)
        ctx.calls, ctx.scale = calls, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        v, out, lse, *copies = ctx.saved_tensors
        works, width = len(ctx.calls.by_work), v.shape[-1]
        grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
        if grads[1] is not None:
            # The gradient of a logit is p * (grad_out @ v - grad_out @ out + grad_lse). A channel that is 1 in the
            # values and 0 in the output, with grad_lse for its gradient, adds the last term and nothing else.
            grad_out = torch.cat((grad_out, grads[1][..., None].to(grad_out.dtype)), -1)
            v, (out, *copies) = F.pad(v, (0, 1), value=1.0), [pad(x, width + 1) for x in (out, *copies)]
        sums = [torch.zeros_like(x, dtype=lse.dtype) for x in (v, *copies)]
        lse = lse.masked_fill(lse == float("-inf"), 0.0)  # rows without any key: weights exp(-inf - 0) = 0
        for work, own_calls in enumerate(ctx.calls.by_work):
            for call in own_calls:
                queries, keys = copies[work], copies[works + call.copy]
                parts = flash_backward(
                    call.rows(grad_out),
                    call.own_rows(queries),
                    call.keys(keys),
                    call.values(v),
                    call.rows(out),
                    call.rows(lse[..., None])[..., 0],
                    0.0,
                    call.tile.kind == "lower",
                    attn_mask=call.bias(queries.dtype),
                    scale=ctx.scale,
                )
                _add(call.own_rows(sums[1 + work]), parts[0], call)
                _add(call.keys(sums[1 + works + call.copy]), parts[1], call)
                _add(call.values(sums[0]), parts[2], call)
        dtyped = [s[..., :width].to(x.dtype) for s, x in zip(sums, (v, *copies), strict=True)]
        return None, None, None, *dtyped


def _add(target_NGLD: Tensor, part_NGLD: Tensor, call: Call) -> None:
    """Add to views whose blocks may overlap: as many tokens at a time as the blocks are apart."""
    length = target_NGLD.shape[2]
    step = call.tile.step if call.tile.count > 1 else length
    for low in range(0, length, step):
        rows = slice(low, low + step)
        target_NGLD[:, :, rows].add_(part_NGLD[:, :, rows])
