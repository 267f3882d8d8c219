"""Segments on torch's CPU flash operator, merged by logsumexp.

The operator returns its logsumexp but no gradient through it, and torch's autograd would silently
ignore that; so the backward pass here calls the operator's own backward for every tile with the
merged output and logsumexp, which is exact.

Shape letters: B batch, N blocks of a tile, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from posenc.backend import AttentionBackend, BackendCapabilities
from posenc.kernels.merge import merge_into
from posenc.kernels.rotated import Work, layout, rotated_keys, rotated_queries
from posenc.kernels.tiles import MASKED_ROWS, Tile, tile
from posenc.plan import PositionPlan
from posenc.rope import Rotary

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Call:
    """One kernel call: a tile of a segment, with ``rows`` counted in all queries and ``keys`` in all keys."""

    work: int
    copy: int
    tile: Tile
    row_offset: int
    key_offset: int
    first: bool
    mask: Tensor | None

    def rows(self, x_BHLD: Tensor) -> Tensor:
        """This call's queries of a tensor over all queries, as a view [B, N, H, L, D]."""
        return _blocks(x_BHLD, self.tile.rows, self.tile, self.row_offset)

    def own_rows(self, x_BHLD: Tensor) -> Tensor:
        """This call's queries of its segment's rotated copy."""
        return _blocks(x_BHLD, self.tile.rows, self.tile, 0)

    def keys(self, x_BHLD: Tensor) -> Tensor:
        """This call's keys of its rotated copy."""
        return _blocks(x_BHLD, self.tile.keys, self.tile, 0)

    def values(self, x_BHLD: Tensor) -> Tensor:
        """This call's values of a tensor over all keys."""
        return _blocks(x_BHLD, self.tile.keys, self.tile, self.key_offset)


class CpuFlashBackend(AttentionBackend):
    """Few large calls of the CPU flash operator, one per rectangle or triangle of a segment."""

    name = "cpu_flash"
    summary = "torch's CPU flash operator on rectangles and triangles, merged by logsumexp"
    capabilities = BackendCapabilities(
        devices=("cpu",),
        dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
        gradients=True,
        masks=True,
        logit_interpolation=True,
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
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        arranged = layout(plan, q_BHLD.shape[2])
        calls = _plan_calls(plan, q_BHLD.shape[2]) if mask is None else _masked_calls(plan, mask)
        queries = [rotated_queries(work, q_BHLD, rotary, plan) for work in arranged.work]
        keys = [rotated_keys(copy, k_BHLD, rotary) for copy in arranged.copies]
        value_dim, width = v_BHLD.shape[-1], max(q_BHLD.shape[-1], v_BHLD.shape[-1])
        queries, keys = [_pad(x, width) for x in queries], [_pad(x, width) for x in keys]
        shape = (*q_BHLD.shape[:3], width)
        run: Any = _FlashTiles.apply
        out_BHLD, lse_BHL = run(calls, shape, scale, len(queries), _pad(v_BHLD, width), *queries, *keys)
        return out_BHLD[..., :value_dim], lse_BHL.float()


def _pad(x_BHLD: Tensor, width: int) -> Tensor:
    """Zero channels up to ``width``: the operator wants one head_dim for query, key and value."""
    return F.pad(x_BHLD, (0, width - x_BHLD.shape[-1])) if x_BHLD.shape[-1] < width else x_BHLD


def _blocks(x_BHLD: Tensor, span: tuple[int, int], shape: Tile, offset: int) -> Tensor:
    """Blocks of a tile as a view [B, N, H, L, D]."""
    first, size = offset + span[0], span[1] - span[0]
    if shape.count == 1:
        return x_BHLD[:, None, :, first : first + size]
    covered = x_BHLD[:, :, first : first + size + (shape.count - 1) * shape.step]
    return covered.unfold(2, size, shape.step).permute(0, 2, 1, 4, 3)


def _plan_calls(plan: PositionPlan, q_len: int) -> tuple[Call, ...]:
    """The calls of an unmasked plan, worked out once and shared by every layer."""
    key = ("cpu_flash", q_len)
    if key not in plan.memo:
        calls: list[Call] = []
        touched = np.zeros(q_len, dtype=bool)
        arranged = layout(plan, q_len)
        for index, work in enumerate(arranged.work):
            for piece in tile(work.key_start, work.key_stop):
                allowed = _interval_mask(work, piece) if piece.kind == "masked" else None
                calls.append(_call(index, work, arranged.copies[work.copy].keys.start, piece, touched, allowed))
        plan.memo[key] = tuple(calls)
    found: tuple[Call, ...] = plan.memo[key]
    return found


def _masked_calls(plan: PositionPlan, mask_B1LL: Tensor) -> tuple[Call, ...]:
    """Calls under a mask: blocks of queries against the keys that any of them may see."""
    q_len = mask_B1LL.shape[2]
    calls: list[Call] = []
    touched = np.zeros(q_len, dtype=bool)
    arranged = layout(plan, q_len)
    for index, work in enumerate(arranged.work):
        start_of_keys = arranged.copies[work.copy].keys.start
        rows = len(work.key_start)
        for low in range(0, rows, MASKED_ROWS):
            high = min(low + MASKED_ROWS, rows)
            live = (work.key_stop > work.key_start)[low:high]
            if not live.any():
                continue
            keys = int(work.key_start[low:high][live].min()), int(work.key_stop[low:high][live].max())
            piece = Tile("masked", (low, high), keys)
            first_row = work.rows.start
            given = mask_B1LL[
                :, :, first_row + low : first_row + high, start_of_keys + keys[0] : start_of_keys + keys[1]
            ]
            allowed = _interval_mask(work, piece).to(given.device) & given
            calls.append(_call(index, work, start_of_keys, piece, touched, allowed))
    return tuple(calls)


def _call(
    index: int, work: Work, key_offset: int, piece: Tile, touched: np.ndarray[Any, Any], allowed: Tensor | None
) -> Call:
    rows = slice(work.rows.start + piece.row_span.start, work.rows.start + piece.row_span.stop)
    first = not touched[rows].any()
    touched[rows] = True
    return Call(index, work.copy, piece, work.rows.start, key_offset, first, allowed)


def _interval_mask(work: Work, piece: Tile) -> Tensor:
    """Pairs of a masked tile that lie inside the intervals, bool [1, 1, rows, keys]."""
    rows, (low, high) = slice(*piece.rows), piece.keys
    keys = np.arange(low, high)
    inside = (keys >= work.key_start[rows, None]) & (keys < work.key_stop[rows, None])
    return torch.from_numpy(inside)[None, None]


class _FlashTiles(torch.autograd.Function):
    """All calls of one attention; gradients for the values and every rotated copy."""

    @staticmethod
    def forward(
        ctx: Any, calls: tuple[Call, ...], shape: tuple[int, ...], scale: float, n: int, v: Tensor, *copies: Tensor
    ) -> tuple[Tensor, Tensor]:
        queries, keys = copies[:n], copies[n:]
        precise = torch.float64 if v.dtype == torch.float64 else torch.float32
        out = torch.zeros(shape, dtype=precise, device=v.device)
        lse = torch.full(shape[:3], float("-inf"), dtype=precise, device=v.device)
        for call in calls:
            flipped = call.tile.kind == "upper"
            q, k, values = (
                _operand(x, flipped)
                for x in (call.own_rows(queries[call.work]), call.keys(keys[call.copy]), call.values(v))
            )
            own_out, own_lse = call.rows(out), call.rows(lse[..., None])[..., 0]
            bias = None if call.mask is None else _bias(call.mask, q)
            causal = call.tile.kind in ("lower", "upper")
            new_out, new_lse = flash(q, k, values, 0.0, causal, attn_mask=bias, scale=scale)
            if call.mask is not None:
                nothing = ~call.mask.any(-1)  # the operator reports 0 for rows that attend nothing
                new_lse = new_lse.masked_fill(nothing, float("-inf"))
                new_out = new_out.masked_fill(nothing[..., None], 0.0)
            if flipped:
                new_out, new_lse = new_out.flip(2), new_lse.flip(2)
            merge_into(own_out, own_lse, new_out.view(own_out.shape), new_lse.reshape(own_lse.shape), first=call.first)
        result = out.to(v.dtype)
        ctx.save_for_backward(v, result, lse, *copies)
        ctx.calls, ctx.scale, ctx.n = calls, scale, n
        ctx.mark_non_differentiable(lse)
        return result, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, out, lse, *copies = ctx.saved_tensors
        grad_out = grads[0]
        sums = [torch.zeros_like(x, dtype=lse.dtype) for x in (v, *copies)]
        grad_v, grad_queries, grad_keys = sums[0], sums[1 : 1 + ctx.n], sums[1 + ctx.n :]
        lse = lse.masked_fill(lse == float("-inf"), 0.0)  # rows without any key: weights exp(-inf - 0) = 0
        for call in ctx.calls:
            flipped = call.tile.kind == "upper"
            q, k, values, g, o = (
                _operand(x, flipped)
                for x in (
                    call.own_rows(copies[call.work]),
                    call.keys(copies[ctx.n + call.copy]),
                    call.values(v),
                    call.rows(grad_out),
                    call.rows(out),
                )
            )
            own_lse = _operand(call.rows(lse[..., None]), flipped)[..., 0]
            bias = None if call.mask is None else _bias(call.mask, q)
            causal = call.tile.kind in ("lower", "upper")
            parts = flash_backward(g, q, k, values, o, own_lse, 0.0, causal, attn_mask=bias, scale=ctx.scale)
            targets = (
                call.own_rows(grad_queries[call.work]),
                call.keys(grad_keys[call.copy]),
                call.values(grad_v),
            )
            for target, part in zip(targets, parts, strict=True):
                target.add_((part.flip(2) if flipped else part).reshape(target.shape))
        dtyped = [s.to(x.dtype) for s, x in zip(sums, (v, *copies), strict=True)]
        return None, None, None, None, *dtyped


def _operand(view: Tensor, flipped: bool) -> Tensor:
    """[B, N, H, L, D] as the operator's [B N, H, L, D]; flipping both axes turns ``c >= r`` into ``c <= r``."""
    merged = view.flatten(0, 1)
    return merged.flip(2) if flipped else merged


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    """Additive form of a bool mask, in the dtype of the queries."""
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
