"""Decode: few queries against many keys, each of which is read once.

The keys of all segments of a request are laid end to end and split evenly. A program takes one split, for the queries
of all heads that share a key/value head. A second, small kernel merges the results of the splits by logsumexp::

    segments       |  head  |             middle              |  tail  |    in the order of the plan
    decode_kernel  [   split 0   |   split 1   |   split 2   | split 3 ]    0 and 3 each run over two segments
    merge_kernel   output and logsumexp of every split -> one row per query and head

Keys are raw, and rotated on read, or come rotated, with one copy for every map; raw keys may lie in pages behind a
block table. Requests with plans of their own run in one launch. The angles of raw keys are computed if all positions
are whole numbers: rows of a table would cost as much traffic as the keys.

Shape letters: B batch, H heads, L tokens, D head_dim, P splits, N requests, M pages of a request, K slots of a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels.triton.launch import launch_options, processors
from posenc.kernels.triton.primitives import (
    Shape,
    angles_of,
    computed_angles,
    finished,
    looked_up_angles,
    online_softmax_update,
    padded,
    rotated_rows,
)
from posenc.kernels.triton.requests import REQUEST, DecodeTables
from posenc.kernels.triton.tables import Scales
from posenc.kernels.triton.tiles import Tiling
from posenc.rope import Rotary

MOST_SPLITS = 64
"""Most splits: the merge holds the results of all of them at once."""

INDIRECT_STAGES = 2
"""More stages to keep as many blocks in flight where a load waits for another: of a page's number, or a table's row."""

LOOKED_UP_KEYS = 32
"""Most keys of a block whose angles are looked up: rows of tables share the memory with keys and values."""

MOST_COPIES = 4
"""Most rotated copies of the keys that a launch can take; every built-in strategy has at most three."""


def decode(
    q_BHLD: Tensor,
    keys: Tensor | Sequence[Tensor],
    v_BHLD: Tensor,
    out_BHLD: Tensor,
    lse_BHL: Tensor,
    tables: DecodeTables,
    rotary: Rotary,
    scales: Scales,
    tiling: Tiling,
    *,
    block_table_NM: Tensor | None = None,
) -> None:
    """Write the attention of few queries to ``out`` and ``lse``.

    Parameters
    ----------
    keys : [B, H, L, D], or as many as ``tables.copies``
        Raw keys; or the rotated copies, channels contiguous, each from the first key of its copy on.
    block_table_NM : int32 [N, M], optional
        Raw keys and values are pages ``[pages, H, K, D]``; key ``j`` of a request is slot ``j % K`` of page
        ``block_table[request, j // K]``. The queries of all requests then follow each other in one batch row.
    """
    heads, kv_heads = q_BHLD.shape[1], v_BHLD.shape[1]
    group, most = heads // kv_heads, max(tables.counts)
    copies = (keys,) if isinstance(keys, Tensor) else tuple(keys)
    assert 1 <= len(copies) <= MOST_COPIES
    looked_up = isinstance(keys, Tensor) and tables.turns[0] is None
    if looked_up or block_table_NM is not None:
        most_keys = LOOKED_UP_KEYS if looked_up else tiling.keys
        tiling = replace(tiling, keys=min(tiling.keys, most_keys), stages=tiling.stages + INDIRECT_STAGES)
    rows = min(padded(group * most), tiling.rows)
    blocks = triton.cdiv(group * most, rows)
    requests = q_BHLD.shape[0] if block_table_NM is None else len(tables.counts)
    num_splits = _num_splits(max(tables.keys), tiling.keys, requests * kv_heads * blocks, processors(q_BHLD.device))
    parts_PBHLD, lses_PBHL = out_BHLD[None], lse_BHL[None]
    if num_splits > 1:
        parts_PBHLD = lse_BHL.new_empty((num_splits, *out_BHLD.shape))
        lses_PBHL = lse_BHL.new_empty((num_splits, *lse_BHL.shape))
    shape = Shape.of(q_BHLD, v_BHLD, rotary, softcap=scales.cap is not None)
    decode_kernel[(num_splits, blocks, requests * kv_heads)](
        q_BHLD, copies, v_BHLD, parts_PBHLD, lses_PBHL, block_table_NM,
        tables.cos_RF, tables.sin_RF, tables.factors, tables.intervals, tables.segments_S8, tables.requests_N8,
        *tables.turns, rotary.attention_scaling,
        *q_BHLD.stride(), tuple(copy.stride()[:3] for copy in copies), copies[0].stride(3), *v_BHLD.stride(),
        *parts_PBHLD.stride()[:4], *lses_PBHL.stride(), 0 if block_table_NM is None else block_table_NM.stride(0),
        REQUEST if len(tables.counts) > 1 else 0, kv_heads, group, scales.factor, scales.cap or 0.0,
        rows, tiling.keys, not isinstance(keys, Tensor), 0 if block_table_NM is None else v_BHLD.shape[2],
        shape, **launch_options(tiling, shape, v_BHLD),
    )  # fmt: skip
    if num_splits > 1:
        batch, _, q_len, _ = out_BHLD.shape
        merge_kernel[(batch * heads * q_len,)](
            parts_PBHLD, lses_PBHL, out_BHLD, lse_BHL, *out_BHLD.stride()[:3], *lse_BHL.stride(),
            num_splits, batch * heads * q_len, heads, q_len,
            shape.value_dim, shape.value_tile, triton.next_power_of_2(num_splits),
        )  # fmt: skip


def _num_splits(keys: int, tile: int, programs: int, processors: int) -> int:
    """Splits for two programs per processor, none so short that starting it costs more than its keys."""
    return max(1, min(-(-2 * processors // programs), MOST_SPLITS, -(-keys // (4 * tile))))


@triton.jit(do_not_specialize=["table_n", "kv_heads", "request_step"])
def decode_kernel(
    q, ks, v, out, lse, table, cos, sin, factors, intervals, segments, requests, turns_f, rest_f, scaling,
    q_b, q_h, q_l, q_d, k_strides, k_d, v_b, v_h, v_l, v_d, o_p, o_b, o_h, o_l, l_p, l_b, l_h, l_l, table_n,
    request_step, kv_heads, group, factor, cap,
    ROWS: tl.constexpr, KEYS: tl.constexpr, KEPT: tl.constexpr, PAGE: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One split of a request's keys, for the queries of all heads that share a key/value head.

    ``x_b`` is the stride of a tensor ``x`` along the dimension ``b``; requests and segments are rows of
    :class:`~posenc.kernels.triton.requests.DecodeTables`.
    """
    split, num_splits = tl.program_id(0), tl.num_programs(0)
    request_number = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    request = requests + request_step * request_number  # a step of 0: the plan of one request serves every batch row
    first_segment, n_segments = tl.load(request), tl.load(request + 1)
    first_query, count = tl.load(request + 2), tl.load(request + 3)
    query_row, first_factor, all_keys = tl.load(request + 4), tl.load(request + 5), tl.load(request + 6)
    split_keys = (all_keys + num_splits - 1) // num_splits
    split_keys = (split_keys + KEYS - 1) // KEYS * KEYS
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token, head = row // group, kv_head * group + row % group
    in_range = token < count
    if PAGE:
        at_query = head * q_h + (first_query + token) * q_l
        at_out = head * o_h + (first_query + token) * o_l
        at_lse = head * l_h + (first_query + token) * l_l
    else:
        at_query = request_number * q_b + head * q_h + token * q_l
        at_out = request_number * o_b + head * o_h + token * o_l
        at_lse = request_number * l_b + head * l_h + token * l_l
        v += request_number * v_b
    v += kv_head * v_h
    scale = tl.full([ROWS], factor, tl.float32)
    if factors is not None:
        scale = scale * tl.load(factors + first_factor + token, mask=in_range, other=1.0)
    acc = tl.full([ROWS, S.value_tile], 0.0, tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.full([ROWS], 0.0, tl.float32)
    n = tl.arange(0, KEYS)
    d = tl.arange(0, S.width)[None, :]
    c = tl.arange(0, S.value_tile)[None, :]
    for index in range(n_segments.to(tl.int32)):
        segment = segments + 8 * (first_segment + index)
        low = tl.load(segment)
        shift = low - tl.load(segment + 2) + split * split_keys
        end = tl.minimum(tl.load(segment + 1), shift + split_keys)
        low = tl.maximum(low, shift)
        if low < end:
            query_table_row = query_row + index * count + token
            at = intervals + 2 * (query_row + index * count) + token
            start = tl.load(at, mask=in_range, other=0)
            stop = tl.minimum(tl.load(at + count, mask=in_range, other=0), end.to(tl.int32))
            if KEPT:
                c1, s1 = angles_of(cos, sin, query_table_row, in_range, S)
                q1 = rotated_rows(q + at_query, q_d, c1, s1, in_range, S).to(S.dot)
                k, k_b, k_h, k_l = chosen(ks, k_strides, tl.load(segment + 3))
                k += request_number * k_b + kv_head * k_h - tl.load(segment + 4) * k_l
            else:
                c1, s1 = looked_up_angles(cos, sin, query_table_row, in_range, S)
                if turns_f is not None:  # computed cos and sin of keys come without the factor
                    c1 *= scaling
                    s1 *= scaling
                q1, q2 = rotated_pairs(q + at_query, q_d, c1, s1, in_range, S)
                q1 = q1.to(S.dot)
                q2 = q2.to(S.dot)
                q3 = q1
                if S.rest:
                    q3 = unrotated_channels(q + at_query, q_d, in_range, S).to(S.dot)
                key_cos = tl.multiple_of(tl.load(segment + 5).to(tl.pointer_type(tl.float32)), 16)
                key_sin = tl.multiple_of(tl.load(segment + 6).to(tl.pointer_type(tl.float32)), 16)
                key_rows = tl.load(segment + 7).to(tl.pointer_type(tl.int32))
                k, k_l = ks[0], k_strides[0][2]
                k += kv_head * k_strides[0][1]
                if not PAGE:
                    k += request_number * k_strides[0][0]
            for first in range(low.to(tl.int32), end.to(tl.int32), KEYS):
                key = first + n
                key_in_range = key < end
                if PAGE:
                    at_page = table + request_number * table_n + key // PAGE
                    page = tl.load(at_page, mask=key_in_range, other=0).to(tl.int64)
                    slot = (key % PAGE).to(tl.int64)
                    at_key = page * k_strides[0][0] + slot * k_l
                    at_value = page * v_b + slot * v_l
                else:
                    at_key = key.to(tl.int64) * k_l
                    at_value = key.to(tl.int64) * v_l
                if KEPT:
                    tile = tl.load(k + at_key[:, None] + d, mask=key_in_range[:, None] & (d < S.dim), other=0.0)
                    s = tl.dot(q1, tl.trans(tile.to(S.dot)), input_precision=S.precision)
                else:
                    key_row = tl.load(key_rows + key, mask=key_in_range, other=0)
                    if turns_f is not None:
                        c2, s2 = computed_angles(key_row, turns_f, rest_f, S)
                    else:
                        c2, s2 = looked_up_angles(key_cos, key_sin, key_row.to(tl.int64), key_in_range, S)
                    k1, k2 = rotated_pairs(k + at_key, k_d, c2, s2, key_in_range, S)
                    kind = k.dtype.element_ty
                    s = tl.dot(q1, tl.trans(k1.to(kind).to(S.dot)), input_precision=S.precision)
                    s = tl.dot(q2, tl.trans(k2.to(kind).to(S.dot)), s, input_precision=S.precision)
                    if S.rest:
                        k3 = unrotated_channels(k + at_key, k_d, key_in_range, S).to(S.dot)
                        s = tl.dot(q3, tl.trans(k3), s, input_precision=S.precision)
                value_mask = key_in_range[:, None] & (c < S.value_dim)
                values = tl.load(v + at_value[:, None] + c * v_d, mask=value_mask, other=0.0)
                allowed = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
                acc, row_max, row_sum = online_softmax_update(
                    acc, row_max, row_sum, s, values, allowed, scale, cap, True, S
                )
    result, logsumexp = finished(acc, row_max, row_sum)
    out_row = out + split.to(tl.int64) * o_p + at_out
    tl.store(out_row[:, None] + c, result.to(out.dtype.element_ty), mask=in_range[:, None] & (c < S.value_dim))
    tl.store(lse + split.to(tl.int64) * l_p + at_lse, logsumexp, mask=in_range)


@triton.jit
def chosen(ks, strides, number):
    """A copy of the keys by its number, and its strides."""
    k, k_b, k_h, k_l = ks[0], strides[0][0].to(tl.int64), strides[0][1].to(tl.int64), strides[0][2].to(tl.int64)
    for other in tl.static_range(1, len(ks)):
        k = tl.where(number == other, ks[other], k)
        k_b = tl.where(number == other, strides[other][0], k_b)
        k_h = tl.where(number == other, strides[other][1], k_h)
        k_l = tl.where(number == other, strides[other][2], k_l)
    return k, k_b, k_h, k_l


@triton.jit
def rotated_pairs(x, channel_stride, c, s, live, S: tl.constexpr):
    """Both channels of every pair, rotated in float32; ``x`` points at the rows, ``live`` says which exist."""
    f = tl.arange(0, S.pair_tile)
    there = live[:, None] & (f < S.pairs)[None, :]
    at = x[:, None] + (S.first + f * S.step)[None, :] * channel_stride
    one = tl.load(at, mask=there, other=0.0).to(tl.float32)
    two = tl.load(at + S.apart * channel_stride, mask=there, other=0.0).to(tl.float32)
    return one * c - two * s, two * c + one * s


@triton.jit
def unrotated_channels(x, channel_stride, live, S: tl.constexpr):
    """The channels before and after the rotated ones."""
    c = tl.arange(0, S.rest_tile)
    channel = tl.where(c < S.first, c, c + 2 * S.pairs)
    there = live[:, None] & (c < S.rest)[None, :]
    return tl.load(x[:, None] + channel[None, :] * channel_stride, mask=there, other=0.0)


@triton.jit(do_not_specialize=["num_splits", "rows", "q_len"])
def merge_kernel(
    parts, part_lses, out, lse, o_b, o_h, o_l, l_b, l_h, l_l,
    num_splits, rows, heads, q_len, VALUE: tl.constexpr, VALUE_TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge one row's results over all splits, each weighted by its share of the softmax."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, SPLITS)
    d = tl.arange(0, VALUE_TILE)
    split_lses = tl.load(part_lses + p * rows.to(tl.int64) + row, mask=p < num_splits, other=float("-inf"))
    row_max = tl.max(split_lses, 0)
    weight = tl.exp2((split_lses - tl.where(row_max == float("-inf"), 0.0, row_max)) * 1.4426950408889634)
    row_sum = tl.sum(weight, 0)
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    at = (p[:, None] * rows.to(tl.int64) + row) * VALUE + d[None, :]
    part = tl.load(parts + at, mask=(p < num_splits)[:, None] & (d < VALUE)[None, :], other=0.0)
    result = tl.sum(part * weight[:, None], 0) / divisor
    batch, head, token = row // (heads * q_len), row // q_len % heads, row % q_len
    out_row = out + batch * o_b + head * o_h + token * o_l + d
    tl.store(out_row, result.to(out.dtype.element_ty), mask=d < VALUE)
    tl.store(lse + batch * l_b + head * l_h + token * l_l, row_max + tl.log2(divisor) * 0.6931471805599453)
