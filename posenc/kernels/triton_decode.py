"""Decode: few queries against many raw keys, which are read once and rotated on read.

The keys of all segments are laid end to end and split evenly; a program takes one split for the queries of all
heads that share a key/value head. Partial results are merged by logsumexp in a second, small kernel.

Shape letters: B batch, H heads, L tokens, D head_dim, P splits.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels.triton_backend import INTERPRETED
from posenc.kernels.triton_parts import Shape, absorb, fetched_ahead, finished, padded, turned, unturned
from posenc.kernels.triton_plan import DecodeTables, Scales
from posenc.rope import Rotary

MOST_SPLITS = 64
"""Splits that the merge holds at once."""


def decode(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    out_BHLD: Tensor,
    lse_BHL: Tensor,
    tables: DecodeTables,
    rotary: Rotary,
    scales: Scales,
) -> None:
    """Attend into ``out`` and ``lse``."""
    batch, heads, q_len, _ = q_BHLD.shape
    kv_heads = k_BHLD.shape[1]
    most_rows, keys, options = _tiling(q_BHLD, v_BHLD)
    rows = min(padded(heads // kv_heads * q_len), most_rows)
    blocks = triton.cdiv(heads // kv_heads * q_len, rows)
    shape = Shape.of(q_BHLD, v_BHLD, rotary, rows=rows, keys=keys, softcap=scales.cap is not None)
    wanted = triton.cdiv(2 * _processors(q_BHLD.device), batch * kv_heads * blocks)
    splits = max(1, min(wanted, MOST_SPLITS, triton.cdiv(tables.keys, 4 * keys)))
    per_split = triton.cdiv(triton.cdiv(tables.keys, splits), keys) * keys
    splits = triton.cdiv(tables.keys, per_split)
    parts, part_lses = out_BHLD[None], lse_BHL[None]
    if splits > 1:
        parts = out_BHLD.new_empty((splits, *out_BHLD.shape), dtype=torch.float32)
        part_lses = lse_BHL.new_empty((splits, *lse_BHL.shape))
    decode_kernel[(splits, blocks, batch * kv_heads)](
        q_BHLD, k_BHLD, v_BHLD, parts, part_lses,
        tables.cos_RF, tables.sin_RF, tables.factors_L, tables.intervals_S2L, tables.segments_S6,
        *q_BHLD.stride(), *k_BHLD.stride(), *v_BHLD.stride(), *parts.stride()[:4], *part_lses.stride()[:3],
        q_len, len(tables.segments_S6), kv_heads, heads // kv_heads, per_split, scales.factor, scales.cap or 0.0,
        shape, **options,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(batch * heads * q_len,)](
            parts, part_lses, out_BHLD, lse_BHL, *out_BHLD.stride()[:3],
            splits, batch * heads * q_len, heads, q_len,
            shape.value_dim, shape.value_tile, triton.next_power_of_2(splits),
        )  # fmt: skip


def _tiling(q_BHLD: Tensor, v_BHLD: Tensor) -> tuple[int, int, dict[str, int]]:
    """Most queries and the keys of a tile, and how the compiler should schedule them."""
    if INTERPRETED:
        return 16, 32, {}
    wide = max(q_BHLD.shape[-1], v_BHLD.shape[-1]) > 128
    rows, keys = (32, 32) if wide else (64, 64)
    if q_BHLD.dtype == torch.float32:
        rows, keys = (16, 16) if wide else (32, 32)
    return rows, keys, {"num_warps": 4, "num_stages": fetched_ahead(2, q_BHLD.device)}


@cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8  # the interpreter: enough to make splits
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit(do_not_specialize=["q_len", "n_segments", "per_split"])
def decode_kernel(
    q, k, v, out, lse, cos, sin, factors, intervals, segments,
    q_b, q_h, q_l, q_d, k_b, k_h, k_l, k_d, v_b, v_h, v_l, v_d, o_p, o_b, o_h, o_l, l_p, l_b, l_h,
    q_len, n_segments, kv_heads, group, per_split, factor, cap, S: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * S.rows + tl.arange(0, S.rows)
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)
    token, head = row // group, kv_head * group + row % group
    real = token < q_len
    x = q + batch * q_b + head * q_h + token * q_l
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    scale = tl.full([S.rows], factor, tl.float32)
    if factors is not None:
        scale = scale * tl.load(factors + token, mask=real, other=1.0)
    acc = tl.full([S.rows, S.value_tile], 0.0, tl.float32)
    peak = tl.full([S.rows], float("-inf"), tl.float32)
    total = tl.full([S.rows], 0.0, tl.float32)
    n = tl.arange(0, S.keys)
    d = tl.arange(0, S.value_tile)[None, :]
    for number in range(n_segments):
        place = segments + 6 * number
        low = tl.load(place)
        shift = low - tl.load(place + 2) + split * per_split
        end = tl.minimum(tl.load(place + 1), shift + per_split)
        low = tl.maximum(low, shift)
        if low < end:
            at = intervals + 2 * number * q_len + token
            start = tl.load(at, mask=real, other=0)
            stop = tl.load(at + q_len, mask=real, other=0)
            key_cos = tl.multiple_of(tl.load(place + 3).to(tl.pointer_type(tl.float32)), 16)
            key_sin = tl.multiple_of(tl.load(place + 4).to(tl.pointer_type(tl.float32)), 16)
            offset = tl.load(place + 5)
            q1, q2 = turned(x, q_d, cos, sin, number * q_len + token, real, S)
            q1 = q1.to(S.dot)
            q2 = q2.to(S.dot)
            q3 = q1
            if S.rest:
                q3 = unturned(x, q_d, real, S).to(S.dot)
            for first in range(low.to(tl.int32), end.to(tl.int32), S.keys):
                key = first + n
                there = key < end
                wide = key.to(tl.int64)
                k1, k2 = turned(k + wide * k_l, k_d, key_cos, key_sin, wide + offset, there, S)
                k1 = k1.to(k.dtype.element_ty)
                k2 = k2.to(k.dtype.element_ty)
                k3 = k1
                if S.rest:
                    k3 = unturned(k + wide * k_l, k_d, there, S)
                known = there[:, None] & (d < S.value_dim)
                values = tl.load(v + wide[:, None] * v_l + d * v_d, mask=known, other=0.0)
                allowed = (key[None, :] >= start[:, None]) & (key[None, :] < tl.minimum(stop, end)[:, None])
                acc, peak, total = absorb(
                    acc, peak, total, q1, q2, q3, k1, k2, k3, values, allowed, scale, cap, True, S)  # fmt: skip
    result, logsumexp = finished(acc, peak, total)
    to = out + split * o_p + batch * o_b + head * o_h + token * o_l
    tl.store(to[:, None] + d, result.to(out.dtype.element_ty), mask=real[:, None] & (d < S.value_dim))
    tl.store(lse + split * l_p + batch * l_b + head * l_h + token, logsumexp, mask=real)


@triton.jit(do_not_specialize=["splits", "rows", "q_len"])
def merge_kernel(
    parts, part_lses, out, lse, o_b, o_h, o_l,
    splits, rows, heads, q_len, VALUE: tl.constexpr, VALUE_TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row's partial outputs, weighted by their share of the softmax."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, SPLITS)
    d = tl.arange(0, VALUE_TILE)
    own = tl.load(part_lses + p * rows.to(tl.int64) + row, mask=p < splits, other=float("-inf"))
    peak = tl.max(own, 0)
    weight = tl.exp2((own - tl.where(peak == float("-inf"), 0.0, peak)) * 1.4426950408889634)
    total = tl.sum(weight, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    at = (p[:, None] * rows.to(tl.int64) + row) * VALUE + d[None, :]
    part = tl.load(parts + at, mask=(p < splits)[:, None] & (d < VALUE)[None, :], other=0.0)
    result = tl.sum(part * weight[:, None], 0) / divisor
    batch, head, token = row // (heads * q_len), row // q_len % heads, row % q_len
    to = out + batch * o_b + head * o_h + token * o_l + d
    tl.store(to, result.to(out.dtype.element_ty), mask=d < VALUE)
    tl.store(lse + row, peak + tl.log2(divisor) * 0.6931471805599453)
