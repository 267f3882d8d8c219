"""Many queries on torch's CPU flash operator, straight into the output.

Batch rows and heads are one axis here: the operator finds the key/value head of a query head by division, which holds
across rows too.

Shape letters: B batch, H heads, G batch rows x heads, N blocks of a tile, L tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from posenc.kernels.cpu.calls import FlashCall, flash_calls, masked_calls
from posenc.kernels.cpu.flash_operator import flash, pad
from posenc.kernels.merge import merge_into
from posenc.kernels.rotated import compute_dtype, rotated_keys, rotated_queries, rotation_layout
from posenc.plan import PositionPlan
from posenc.rope import Rotary

CHUNK_BYTES = 16 * 2**20
"""Heads are computed in groups whose queries take about this much. Memory below malloc's 32 MiB limit for mappings of
their own is used again, and fresh pages cost more than the rotation of what they hold."""

BLOCK_BYTES = 4 * 2**20
"""Outputs of batched blocks that wait to be merged: few enough to be merged while they are in the cache."""


def prefill(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    plan: PositionPlan,
    rotary: Rotary,
    scale: float,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of any number of queries, without gradients: tile by tile, some rows and heads at a time."""
    batch, heads, q_len, _ = q_BHLD.shape
    width, layout = v_BHLD.shape[-1], rotation_layout(plan, q_len)
    group, chunks = heads // k_BHLD.shape[1], list(_chunks(q_BHLD, k_BHLD, row_by_row=mask is not None))
    if chunks[0][0] == slice(0, 1):  # as [B, L, H, D] in memory: so models read it, and so the operator writes
        out_BHLD = q_BHLD.new_empty((batch, q_len, heads, width)).transpose(1, 2)
    else:
        out_BHLD = q_BHLD.new_empty((batch, heads, q_len, width))
    lse_BHL = q_BHLD.new_empty((batch, heads, q_len), dtype=compute_dtype(q_BHLD))
    for rows, key_heads in chunks:
        query_heads = slice(key_heads.start * group, key_heads.stop * group)
        q, k, v = q_BHLD[rows, query_heads], k_BHLD[rows, key_heads], v_BHLD[rows, key_heads].flatten(0, 1)
        out, lse = (x[rows, query_heads].flatten(0, 1) for x in (out_BHLD, lse_BHL))
        merged = out if out.dtype == lse.dtype else torch.empty_like(out, dtype=lse.dtype)
        calls = flash_calls(plan, q_len) if mask is None else masked_calls(plan, mask[rows])
        if not calls.complete:
            merged.zero_()
            lse.fill_(float("-inf"))
        keys = [pad(rotated_keys(copy, k, rotary), width).flatten(0, 1) for copy in layout.keys]
        memory = torch.empty_like(q)  # shared by the rotated queries of all segments
        for copy, segment_calls in zip(layout.queries, calls.by_segment, strict=True):
            queries = pad(rotated_queries(copy, q, rotary, memory), width).flatten(0, 1)
            for call in segment_calls:
                attend_tile(call, queries, keys[call.key_copy], v, merged, lse, scale)
        if merged is not out:
            out.copy_(merged)
    return out_BHLD, lse_BHL


def _chunks(q_BHLD: Tensor, k_BHLD: Tensor, *, row_by_row: bool) -> Iterator[tuple[slice, slice]]:
    """Batch rows and key/value heads that are computed together: all rows if they fit into a chunk, else one row."""
    batch, heads, q_len, dim = q_BHLD.shape
    key_heads = k_BHLD.shape[1]
    head_bytes = heads // key_heads * q_len * dim * q_BHLD.element_size()
    if batch == 1 or row_by_row or batch * key_heads * head_bytes > CHUNK_BYTES:
        together = max(1, min(key_heads, round(CHUNK_BYTES / head_bytes)))
        for row in range(batch):
            for first in range(0, key_heads, together):
                yield slice(row, row + 1), slice(first, min(first + together, key_heads))
    else:
        yield slice(0, batch), slice(0, key_heads)


def attend_tile(
    call: FlashCall,
    queries_GLD: Tensor,
    keys_GLD: Tensor,
    v_GLD: Tensor,
    out_GLD: Tensor,
    lse_GL: Tensor,
    scale: float,
) -> None:
    """Merge one call into the running output and logsumexp, some of its blocks at a time.

    Parameters
    ----------
    queries_GLD, keys_GLD : Tensor
        The rotated copies that the call reads.
    v_GLD : Tensor
        All values.
    out_GLD, lse_GL : Tensor
        Of all queries; changed in place.
    """
    operands = call.queries(queries_GLD), call.keys(keys_GLD), call.values(v_GLD)
    target, target_lse = call.rows(out_GLD), call.rows(lse_GL[..., None])[..., 0]
    bias, empty_rows = call.bias(queries_GLD.dtype), call.empty_rows()
    together = max(1, BLOCK_BYTES // (operands[0][0].numel() * out_GLD.element_size()))
    for first in range(0, call.tile.count, together):
        blocks = slice(first, first + together)
        new_out, new_lse = flash(*(x[blocks] for x in operands), 0.0, call.is_causal, attn_mask=bias, scale=scale)
        if empty_rows is not None:  # the operator reports 0 for rows that attend nothing
            new_lse = new_lse.masked_fill(empty_rows, float("-inf"))
            new_out = new_out.masked_fill(empty_rows[..., None], 0.0)
        merge_into(target[blocks], target_lse[blocks], new_out, new_lse, first=call.first)
