"""Prefill: all segments of a plan in one pass over the keys, under one online softmax.

Queries and keys are rotated first: the keys once per distinct map of the plan, the queries once per segment. A program
holds a block of queries of one head and runs over the keys of one segment after the other. Only the key blocks that
some query of the block attends in part are masked. Apart from that, the kernel is flash attention over two buffers.

Shape letters: B batch, H heads, L tokens, D head_dim, S segments, T rows of a buffer, W head_dim padded to a power of
two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from posenc.kernels.devices import loadable
from posenc.kernels.triton.launch import launch_options, processors
from posenc.kernels.triton.primitives import Shape, finished, online_softmax_update
from posenc.kernels.triton.rotate import rotate
from posenc.kernels.triton.tables import BufferRows, PrefillTables, Scales
from posenc.kernels.triton.tiles import Tiling
from posenc.rope import Rotary

WAVES = 16
"""Programs per processor that a launch keeps where heads run in several launches, which hold fewer rotated rows."""


def prefill(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    out_BHLD: Tensor,
    lse_BHL: Tensor,
    tables: PrefillTables,
    rotary: Rotary,
    scales: Scales,
    tiling: Tiling,
) -> None:
    """Write the attention to ``out`` and ``lse``; rotated queries and keys are held for some heads at a time."""
    shape = Shape.of(q_BHLD, v_BHLD, rotary, softcap=scales.cap is not None)
    kv_heads, group = k_BHLD.shape[1], q_BHLD.shape[1] // k_BHLD.shape[1]
    at_once = _heads_at_once(q_BHLD, kv_heads, tables, tiling)
    for first in range(0, kv_heads, at_once):
        heads, key_heads = slice(first * group, (first + at_once) * group), slice(first, first + at_once)
        _heads(
            q_BHLD[:, heads], k_BHLD[:, key_heads], v_BHLD[:, key_heads], out_BHLD[:, heads], lse_BHL[:, heads],
            tables, scales, shape, tiling,
        )  # fmt: skip


def _heads_at_once(q_BHLD: Tensor, kv_heads: int, tables: PrefillTables, tiling: Tiling) -> int:
    """Key/value heads of a launch: few enough that the buffers stay near the size of the queries."""
    batch, heads, q_len, _ = q_BHLD.shape
    copies = -(-sum(rows.count for rows in tables.queries) // q_len)  # of the queries, rounded up
    programs = batch * heads * -(-q_len // tiling.rows)
    launches = max(1, min(copies, programs // (WAVES * processors(q_BHLD.device)), kv_heads))
    return -(-kv_heads // launches)


def _heads(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    out_BHLD: Tensor,
    lse_BHL: Tensor,
    tables: PrefillTables,
    scales: Scales,
    shape: Shape,
    tiling: Tiling,
) -> None:
    batch, heads, q_len, _ = q_BHLD.shape
    queries_BHTW = _rotated(q_BHLD, tables.queries, shape)
    keys_BHTW = _rotated(k_BHLD, tables.keys, shape)
    q, k, v = queries_BHTW, keys_BHTW, v_BHLD
    if tiling.tma:
        q = descriptor(queries_BHTW, tiling.rows, shape.width)
        k = descriptor(keys_BHTW, tiling.keys, shape.width)
        v = descriptor(v_BHLD, tiling.keys, shape.value_tile)
    prefill_kernel[(triton.cdiv(q_len, tiling.rows), batch * heads)](
        q, k, v, out_BHLD, lse_BHL, tables.factors_L, tables.intervals_S2L, tables.segments_S3,
        queries_BHTW.shape[2], keys_BHTW.shape[2], *v_BHLD.stride(), *out_BHLD.stride()[:3], *lse_BHL.stride()[:2],
        q_len, len(tables.segments_S3), heads, heads // k_BHLD.shape[1], scales.factor, scales.cap or 0.0,
        tiling.rows, tiling.keys, tiling.tma, shape, **launch_options(tiling, shape, q_BHLD),
    )  # fmt: skip


def _rotated(x_BHLD: Tensor, parts: tuple[BufferRows, ...], shape: Shape) -> Tensor:
    """Runs of rows, each rotated by its own angles, one after the other: [B, H, T, W]."""
    buffer_BHTW = x_BHLD.new_empty(*x_BHLD.shape[:2], sum(part.count for part in parts), shape.width)
    place = 0
    for part in parts:
        rotate(x_BHLD[:, :, part.rows], buffer_BHTW[:, :, place : place + part.count], part.angles, shape)
        place += part.count
    return buffer_BHTW


def takes_descriptor(x_BHLD: Tensor) -> bool:
    """Whether the tensor memory accelerator can read a tensor as it lies: it cannot read expanded dimensions."""
    return loadable(x_BHLD) and 0 not in x_BHLD.stride()


def descriptor(x_BHLD: Tensor, rows: int, channels: int) -> TensorDescriptor:
    """Tiles of ``rows`` tokens of one head; what lies outside of the tensor is read as zeros."""
    return TensorDescriptor(x_BHLD, list(x_BHLD.shape), list(x_BHLD.stride()), [1, 1, rows, channels])


@triton.jit(do_not_specialize=["q_rows", "k_rows", "q_len", "n_segments"])
def prefill_kernel(
    q, k, v, out, lse, factors, intervals, segments,
    q_rows, k_rows, v_b, v_h, v_l, v_d, o_b, o_h, o_l, l_b, l_h,
    q_len, n_segments, heads, group, factor, cap,
    ROWS: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head over the keys of all segments.

    ``x_b`` is the stride of a tensor ``x`` along the dimension ``b``; segments are rows of
    :class:`~posenc.kernels.triton.tables.PrefillTables`.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries have the most keys: start with them
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    kv_head = head // group
    row = block * ROWS + tl.arange(0, ROWS)
    in_range = row < q_len
    scale = tl.full([ROWS], factor, tl.float32)
    if factors is not None:
        scale = scale * tl.load(factors + row, mask=in_range, other=1.0)
    if not TMA:
        q += (batch * heads + head).to(tl.int64) * q_rows * S.width
        k += (batch * (heads // group) + kv_head).to(tl.int64) * k_rows * S.width
        v += batch.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    acc = tl.full([ROWS, S.value_tile], 0.0, tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.full([ROWS], 0.0, tl.float32)
    for number in range(n_segments):
        at = intervals + 2 * number * q_len + row
        start = tl.load(at, mask=in_range, other=0)
        stop = tl.load(at + q_len, mask=in_range, other=0)
        live = stop > start
        end = tl.max(tl.where(live, stop, 0), 0)
        if end > 0:
            # Keys from `low` are attended by some query, from `whole` to `shared` by every one that exists.
            low = tl.min(tl.where(live, start, end), 0)
            latest = tl.max(tl.where(live, start, low), 0)
            earliest = tl.min(tl.where(live, stop, tl.where(in_range, low, end)), 0)
            whole = low + (latest - low + KEYS - 1) // KEYS * KEYS
            shared = whole + tl.maximum(earliest - whole, 0) // KEYS * KEYS
            segment = segments + 3 * number
            k_at = tl.load(segment).to(tl.int32)
            v_at = tl.load(segment + 1).to(tl.int32)
            first = block * ROWS + tl.load(segment + 2).to(tl.int32)
            if TMA:
                tile = q.load([batch, head, first, 0]).reshape([ROWS, S.width])
            else:
                d = tl.arange(0, S.width)[None, :]
                query_rows = (first + tl.arange(0, ROWS)).to(tl.int64)
                tile = tl.load(q + query_rows[:, None] * S.width + d, mask=live[:, None], other=0.0)
            tile = tile.to(S.dot)
            acc, row_max, row_sum = over_keys(
                acc, row_max, row_sum, tile, k, v, batch, kv_head, k_at, v_at, v_l, v_d,
                low, tl.minimum(whole, end), end, start, stop, scale, cap, True, KEYS, TMA, S)  # fmt: skip
            acc, row_max, row_sum = over_keys(
                acc, row_max, row_sum, tile, k, v, batch, kv_head, k_at, v_at, v_l, v_d,
                whole, shared, end, start, stop, scale, cap, False, KEYS, TMA, S)  # fmt: skip
            acc, row_max, row_sum = over_keys(
                acc, row_max, row_sum, tile, k, v, batch, kv_head, k_at, v_at, v_l, v_d,
                shared, end, end, start, stop, scale, cap, True, KEYS, TMA, S)  # fmt: skip
    result, logsumexp = finished(acc, row_max, row_sum)
    c = tl.arange(0, S.value_tile)[None, :]
    out_row = out + batch.to(tl.int64) * o_b + head.to(tl.int64) * o_h + row.to(tl.int64)[:, None] * o_l + c
    tl.store(out_row, result.to(out.dtype.element_ty), mask=in_range[:, None] & (c < S.value_dim))
    tl.store(lse + batch.to(tl.int64) * l_b + head.to(tl.int64) * l_h + row, logsumexp, mask=in_range)


@triton.jit
def over_keys(
    acc, row_max, row_sum, q, k, v, batch, kv_head, k_at, v_at, v_l, v_d, first, last, end,
    start, stop, scale, cap, MASKED: tl.constexpr, KEYS: tl.constexpr, TMA: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Key blocks from ``first`` to ``last``; where not masked, every query attends all of them."""
    n = tl.arange(0, KEYS)
    d = tl.arange(0, S.width)[None, :]
    c = tl.arange(0, S.value_tile)[None, :]
    if not TMA:
        k_block = k + (k_at + first).to(tl.int64) * S.width + n[:, None] * S.width + d
        v_block = v + (v_at + first).to(tl.int64) * v_l + n[:, None].to(tl.int64) * v_l + c * v_d
    for low in range(first, last, KEYS):
        key = low + n
        if TMA:  # rows beyond `end` are read, and masked
            keys = k.load([batch, kv_head, k_at + low, 0]).reshape([KEYS, S.width])
            values = v.load([batch, kv_head, v_at + low, 0]).reshape([KEYS, S.value_tile])
        else:
            key_mask = tl.full([KEYS, 1], 1, tl.int1)
            if MASKED:
                key_mask = (key < end)[:, None]
            value_mask = key_mask
            if S.value_dim != S.value_tile:
                value_mask = key_mask & (c < S.value_dim)
            keys = tl.load(k_block, mask=key_mask, other=0.0)
            values = tl.load(v_block, mask=value_mask, other=0.0)
            k_block += KEYS * S.width
            v_block += KEYS * v_l
        s = tl.dot(q, tl.trans(keys.to(S.dot)), input_precision=S.precision)
        allowed = (key[None, :] >= start[:, None]) & (key[None, :] < stop[:, None])
        acc, row_max, row_sum = online_softmax_update(acc, row_max, row_sum, s, values, allowed, scale, cap, MASKED, S)
    return acc, row_max, row_sum
