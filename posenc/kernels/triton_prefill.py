"""Prefill: all segments of a plan in one pass over the keys, under one online softmax.

The keys are rotated first, once per distinct map of the plan, into one buffer; a segment reads its copy at an offset.
A program owns a block of queries of one head. For each segment it rotates that block on read and runs over the
segment's keys; only the key blocks that some query of the block attends in part are masked.

Shape letters: B batch, H heads, L tokens, D head_dim, S segments, T rows of the key buffer, W its width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels.triton_backend import INTERPRETED
from posenc.kernels.triton_parts import Shape, absorb, fetched_ahead, finished, turned, unturned
from posenc.kernels.triton_plan import PrefillTables, Scales
from posenc.rope import Rotary


def prefill(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    out_BHLD: Tensor,
    lse_BHL: Tensor,
    tables: PrefillTables,
    rotary: Rotary,
    scales: Scales,
) -> None:
    """Attend into ``out`` and ``lse``."""
    batch, heads, q_len, _ = q_BHLD.shape
    kv_heads = k_BHLD.shape[1]
    rows, keys, options = _tiling(q_BHLD, v_BHLD)
    shape = Shape.of(q_BHLD, v_BHLD, rotary, rows=rows, keys=keys, softcap=scales.cap is not None)
    buffer_BHTW = _rotated(k_BHLD, tables, shape)
    prefill_kernel[(triton.cdiv(q_len, rows), batch * heads)](
        q_BHLD, buffer_BHTW, v_BHLD, out_BHLD, lse_BHL,
        tables.cos_RF, tables.sin_RF, tables.factors_L, tables.intervals_S2L, tables.segments_S3,
        *q_BHLD.stride(), buffer_BHTW.stride(1), *v_BHLD.stride(), *out_BHLD.stride()[:3],
        q_len, len(tables.segments_S3), heads, heads // kv_heads, scales.factor, scales.cap or 0.0,
        shape, **options,
    )  # fmt: skip


def _tiling(q_BHLD: Tensor, v_BHLD: Tensor) -> tuple[int, int, dict[str, int]]:
    """Queries and keys per tile, and how the compiler should schedule them: what hardly spills registers."""
    if INTERPRETED:  # small tiles, so that short inputs cross many
        return 64, 32, {}
    width = max(q_BHLD.shape[-1], v_BHLD.shape[-1])
    rows, keys, warps, stages = (128, 64, 8, 3) if q_BHLD.shape[2] > 64 else (64, 64, 4, 3)
    if q_BHLD.dtype == torch.float32:
        rows, keys, warps, stages = (32, 32, 4, 2) if width <= 128 else (32, 32, 8, 2)
    elif width > 128:
        rows, keys, warps, stages = 64, 32, 8, 2
    elif width <= 64:
        keys = 128
    return rows, keys, {"num_warps": warps, "num_stages": fetched_ahead(stages, q_BHLD.device)}


def _rotated(k_BHLD: Tensor, tables: PrefillTables, shape: Shape) -> Tensor:
    """The keys of every copy, one behind the other, as tiles that need no masking: [B, Hkv, T, W]."""
    batch, heads = k_BHLD.shape[:2]
    buffer_BHTW = k_BHLD.new_empty(batch, heads, tables.copied, 2 * shape.pair_tile + shape.rest_tile)
    place, block = 0, 32
    for keys, cos_LF, sin_LF in tables.copies:
        count = keys.stop - keys.start
        rotate_keys_kernel[(triton.cdiv(count, block), batch * heads)](
            k_BHLD[:, :, keys], buffer_BHTW[:, :, place:], cos_LF, sin_LF,
            *k_BHLD.stride(), buffer_BHTW.stride(1), count, heads, block, shape,
        )  # fmt: skip
        place += count
    return buffer_BHTW


@triton.jit(do_not_specialize=["n_keys"])
def rotate_keys_kernel(
    k, buffer, cos, sin, k_b, k_h, k_l, k_d, buffer_h, n_keys, heads, BLOCK: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = row < n_keys
    both = tl.program_id(1).to(tl.int64)
    x = k + both // heads * k_b + both % heads * k_h + row * k_l
    one, two = turned(x, k_d, cos, sin, row, live, S)
    width: tl.constexpr = 2 * S.pair_tile + S.rest_tile
    to = buffer + both * buffer_h + row[:, None] * width
    kind = buffer.dtype.element_ty
    f = tl.arange(0, S.pair_tile)[None, :]
    tl.store(to + f, one.to(kind), mask=live[:, None])
    tl.store(to + S.pair_tile + f, two.to(kind), mask=live[:, None])
    if S.rest:
        c = tl.arange(0, S.rest_tile)[None, :]
        tl.store(to + 2 * S.pair_tile + c, unturned(x, k_d, live, S).to(kind), mask=live[:, None])


@triton.jit(do_not_specialize=["q_len", "n_segments"])
def prefill_kernel(
    q, k, v, out, lse, cos, sin, factors, intervals, segments,
    q_b, q_h, q_l, q_d, k_h, v_b, v_h, v_l, v_d, o_b, o_h, o_l,
    q_len, n_segments, heads, group, factor, cap, S: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries have the most keys: start with them
    both = tl.program_id(1)
    batch, head = (both // heads).to(tl.int64), (both % heads).to(tl.int64)
    kv_head = head // group
    row = block * S.rows + tl.arange(0, S.rows)
    real = row < q_len
    x = q + batch * q_b + head * q_h + row.to(tl.int64) * q_l
    k += (batch * (heads // group) + kv_head) * k_h
    v += batch * v_b + kv_head * v_h
    scale = tl.full([S.rows], factor, tl.float32)
    if factors is not None:
        scale = scale * tl.load(factors + row, mask=real, other=1.0)
    acc = tl.full([S.rows, S.value_tile], 0.0, tl.float32)
    peak = tl.full([S.rows], float("-inf"), tl.float32)
    total = tl.full([S.rows], 0.0, tl.float32)
    for number in range(n_segments):
        at = intervals + 2 * number * q_len + row
        start = tl.load(at, mask=real, other=0)
        stop = tl.load(at + q_len, mask=real, other=0)
        live = stop > start
        end = tl.max(tl.where(live, stop, 0), 0)
        if end > 0:
            # Keys from `low` are attended by some query, from `whole` to `shared` by every one that exists.
            low = tl.min(tl.where(live, start, end), 0)
            latest = tl.max(tl.where(live, start, low), 0)
            earliest = tl.min(tl.where(live, stop, tl.where(real, low, end)), 0)
            whole = low + (latest - low + S.keys - 1) // S.keys * S.keys
            shared = whole + tl.maximum(earliest - whole, 0) // S.keys * S.keys
            place = segments + 3 * number
            q1, q2 = turned(x, q_d, cos, sin, tl.load(place + 2) + row, live, S)
            q1 = q1.to(S.dot)
            q2 = q2.to(S.dot)
            q3 = q1
            if S.rest:
                q3 = unturned(x, q_d, real, S).to(S.dot)
            keys = k + tl.load(place) * (2 * S.pair_tile + S.rest_tile)
            values = v + tl.load(place + 1) * v_l
            acc, peak, total = over_keys(
                acc, peak, total, q1, q2, q3, keys, values, v_l, v_d, low, tl.minimum(whole, end), end,
                start, stop, scale, cap, True, S)  # fmt: skip
            acc, peak, total = over_keys(
                acc, peak, total, q1, q2, q3, keys, values, v_l, v_d, whole, shared, end,
                start, stop, scale, cap, False, S)  # fmt: skip
            acc, peak, total = over_keys(
                acc, peak, total, q1, q2, q3, keys, values, v_l, v_d, shared, end, end,
                start, stop, scale, cap, True, S)  # fmt: skip
    result, logsumexp = finished(acc, peak, total)
    d = tl.arange(0, S.value_tile)[None, :]
    to = out + batch * o_b + head * o_h + row.to(tl.int64)[:, None] * o_l + d
    tl.store(to, result.to(out.dtype.element_ty), mask=real[:, None] & (d < S.value_dim))
    tl.store(lse + both.to(tl.int64) * q_len + row, logsumexp, mask=real)


@triton.jit
def over_keys(
    acc, peak, total, q1, q2, q3, k, v, v_l, v_d, first, last, end,
    start, stop, scale, cap, MASKED: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Key blocks from ``first`` to ``last``; where not masked, every query attends all of them."""
    n = tl.arange(0, S.keys)
    f = tl.arange(0, S.pair_tile)[None, :]
    d = tl.arange(0, S.value_tile)[None, :]
    width: tl.constexpr = 2 * S.pair_tile + S.rest_tile
    k += first.to(tl.int64) * width
    v += first.to(tl.int64) * v_l
    k_at, v_at = n[:, None] * width, n[:, None].to(tl.int64) * v_l + d * v_d
    for low in range(first, last, S.keys):
        key = low + n
        known = tl.full([S.keys, 1], 1, tl.int1)
        if MASKED:
            known = (key < end)[:, None]
        whole = known
        if S.value_dim != S.value_tile:
            whole = known & (d < S.value_dim)
        k1 = tl.load(k + k_at + f, mask=known, other=0.0)
        k2 = tl.load(k + k_at + S.pair_tile + f, mask=known, other=0.0)
        k3 = k1
        if S.rest:
            k3 = tl.load(k + k_at + 2 * S.pair_tile + tl.arange(0, S.rest_tile)[None, :], mask=known, other=0.0)
        values = tl.load(v + v_at, mask=whole, other=0.0)
        allowed = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
        acc, peak, total = absorb(acc, peak, total, q1, q2, q3, k1, k2, k3, values, allowed, scale, cap, MASKED, S)
        k += S.keys * width
        v += S.keys * v_l
    return acc, peak, total
