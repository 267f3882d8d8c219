"""Rotate rows once, before a kernel reads them many times.

Shape letters: B batch, H heads, L tokens, D head_dim, F rotary frequencies, W head_dim padded to a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels.rotated import KeyCopy
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.kernels.triton.angles import Angles, key_angles
from posenc.kernels.triton.mode import INTERPRETED
from posenc.kernels.triton.primitives import Shape, angles_of, rotated_rows
from posenc.rope import Rotary

BLOCK = 128 if INTERPRETED else 32
"""Rows of a program."""

SHARED_HEADS = 8
MANY_ROWS = 1024
"""From ``MANY_ROWS`` rows on, a program rotates ``SHARED_HEADS`` heads, for which it looks up cos and sin once."""


def rotate(x_BHLD: Tensor, out_BHLW: Tensor, angles: Angles, shape: Shape) -> None:
    """Rotate rows into memory whose channels are contiguous; channels beyond D become zeros.

    Parameters
    ----------
    out_BHLW : [B, H, L, W] or [B, H, L, D]
        Where the rows go, in the dtype of ``x``.
    angles : Angles
        Of the L rows.
    """
    batch, heads, rows, _ = x_BHLD.shape
    shared = SHARED_HEADS if rows >= MANY_ROWS else 1
    rotate_kernel[(triton.cdiv(rows, BLOCK), batch * triton.cdiv(heads, shared))](
        x_BHLD, out_BHLW, angles.cos_RF, angles.sin_RF, angles.rows_L,
        *x_BHLD.stride(), *out_BHLW.stride()[:3], rows, heads, out_BHLW.shape[-1], shared, BLOCK, shape,
    )  # fmt: skip


def kept_copies(k_BHLD: Tensor, copies: Sequence[KeyCopy], rotary: Rotary, kept: RotatedKeyCache) -> list[Tensor]:
    """The rotated copies of the keys, each from its first key on, channels contiguous; only new keys are rotated."""
    shape = Shape.of(k_BHLD, k_BHLD, rotary, softcap=False)
    return [_kept_copy(k_BHLD, copy, rotary, kept, shape) for copy in copies]


def _kept_copy(k_BHLD: Tensor, copy: KeyCopy, rotary: Rotary, kept: RotatedKeyCache, shape: Shape) -> Tensor:
    if copy.is_raw(rotary):
        return k_BHLD[:, :, copy.keys]
    table, offset = key_angles(copy.segment, rotary, k_BHLD.device)

    def rotate_keys(keys: slice, out_BHLD: Tensor) -> Tensor:
        rotate(k_BHLD[:, :, keys], out_BHLD, table.of(slice(offset + keys.start, offset + keys.stop)), shape)
        return out_BHLD

    return kept.rotated(copy.segment, copy.keys, k_BHLD, rotary, rotate_keys)


@triton.jit(do_not_specialize=["n_rows"])
def rotate_kernel(
    x, out, cos, sin, table_rows, x_b, x_h, x_l, x_d, o_b, o_h, o_l,
    n_rows, heads, WRITTEN: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Some rows of some heads of one batch row; ``WRITTEN`` is how many channels of the output exist."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    groups = (heads + SHARED - 1) // SHARED
    batch, first = (tl.program_id(1) // groups).to(tl.int64), (tl.program_id(1) % groups).to(tl.int64) * SHARED
    at = tl.load(table_rows + row, mask=row < n_rows, other=0).to(tl.int64)
    c, s = angles_of(cos, sin, at, row < n_rows, S)
    d = tl.arange(0, S.width)[None, :]
    for index in range(SHARED):
        head = first + index
        live = (row < n_rows) & (head < heads)
        value = rotated_rows(x + batch * x_b + head * x_h + row * x_l, x_d, c, s, live, S)
        to = out + batch * o_b + head * o_h + row[:, None] * o_l + d
        tl.store(to, value.to(out.dtype.element_ty), mask=live[:, None] & (d < WRITTEN))
