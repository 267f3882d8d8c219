"""What the Triton kernels share: the shape of a head, rotated rows, the online softmax.

Rotary channels come in pairs: pair ``f`` is channel ``first + f * step`` and the channel ``apart`` after it, which
covers both styles and partial rotation. Rows that are rotated once and read often are stored in the natural order of
their channels, zero-padded to what a tile may have, so that one matrix product takes the whole head.

Importing this module imports triton: the backend does so when a kernel is first used.

Shape letters: B batch, H heads, L tokens, D head_dim, W head_dim padded to a power of two, F rotary frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from posenc.kernels.triton.angles import RADIANS_PER_STEP
from posenc.kernels.triton.mode import INTERPRETED, mend_interpreter
from posenc.rope import Rotary

if INTERPRETED:
    from triton.runtime import interpreter

    mend_interpreter(interpreter)

APPROXIMATE = tl.constexpr(not INTERPRETED)
RADIANS = tl.constexpr(RADIANS_PER_STEP)

SMALLEST = 16
"""Least extent of a tile in ``tl.dot``."""


@dataclass(frozen=True)
class Shape:
    """Everything about the heads that a kernel is compiled for.

    Parameters
    ----------
    pairs, first, step, apart : int
        Rotary channels: pair ``f`` is channels ``first + f * step`` and ``first + f * step + apart``.
    dim, rest : int
        Channels of queries and keys, and those of them that are not rotated.
    value_dim : int
        Channels of the values.
    width, pair_tile, rest_tile, value_tile : int
        ``dim``, ``pairs``, ``rest`` and ``value_dim`` padded to what a tile may have; ``rest_tile`` is 0 where
        every channel is rotated.
    softcap : bool
        Whether logits are capped.
    dot : triton dtype
        Operands of the matrix products, which always add up in float32.
    precision : str
        ``input_precision`` of those products.
    """

    pairs: int
    first: int
    step: int
    apart: int
    dim: int
    rest: int
    value_dim: int
    width: int
    pair_tile: int
    rest_tile: int
    value_tile: int
    softcap: bool
    dot: tl.dtype
    precision: str

    @classmethod
    def of(cls, q_BHLD: Tensor, v_BHLD: Tensor, rotary: Rotary, *, softcap: bool) -> Shape:
        """The shape of a case; the same object for the same case, since every launch hashes it."""
        pairs, half = len(rotary.inv_freq), rotary.style == "half"
        return _shape(pairs, *rotary.rotated, half, q_BHLD.shape[-1], v_BHLD.shape[-1], softcap, q_BHLD.dtype)


@lru_cache(maxsize=256)
def _shape(
    pairs: int, first: int, stop: int, half: bool, dim: int, value_dim: int, softcap: bool, dtype: torch.dtype
) -> Shape:
    step, apart = (1, pairs) if half else (2, 1)
    dot = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]
    if INTERPRETED:  # numpy, which it computes with, has no bfloat16
        dot = tl.float32
    precision, rest = "tf32x3" if dtype == torch.float32 else "tf32", dim - (stop - first)
    tiles = padded(dim), padded(pairs), padded(rest) if rest else 0, padded(value_dim)
    return Shape(pairs, first, step, apart, dim, rest, value_dim, *tiles, softcap, dot, precision)


def padded(count: int) -> int:
    """The next extent that a tile may have."""
    return max(SMALLEST, 1 << (count - 1).bit_length())


@triton.jit
def angles_of(cos, sin, table_rows, live, S: tl.constexpr):
    """cos and sin for every channel of some rows, sin with the sign of its product; 1 and 0 where none is rotated."""
    d = tl.arange(0, S.width)
    at = d - S.first
    if S.step == 1:
        second, pair = at >= S.pairs, at % S.pairs
    else:
        second, pair = at % 2 == 1, at // 2
    there = live[:, None] & ((at >= 0) & (at < 2 * S.pairs))[None, :]
    place = table_rows[:, None] * S.pairs + pair[None, :]
    c = tl.load(cos + place, mask=there, other=1.0)
    s = tl.load(sin + place, mask=there, other=0.0)
    return c, tl.where(second[None, :], s, -s)


@triton.jit
def cos_and_sin(angles):
    """cos and sin of float32 angles in [-2 pi, 2 pi], to 1e-6: instructions of the GPU, which tl.cos does not use."""
    if APPROXIMATE:
        c, s = libdevice.fast_cosf(angles), libdevice.fast_sinf(angles)
    else:
        c, s = tl.cos(angles), tl.sin(angles)
    return c, s


@triton.jit
def looked_up_angles(cos, sin, table_rows, live, S: tl.constexpr):
    """cos and sin of every pair, from rows of a table."""
    f = tl.arange(0, S.pair_tile)
    there = live[:, None] & (f < S.pairs)[None, :]
    place = table_rows[:, None] * S.pairs + f[None, :]
    return tl.load(cos + place, mask=there, other=0.0), tl.load(sin + place, mask=there, other=0.0)


@triton.jit
def computed_angles(positions, turns_f, rest_f, S: tl.constexpr):
    """cos and sin of every pair, from whole positions: see :func:`~posenc.kernels.triton.angles.turns`."""
    f = tl.arange(0, S.pair_tile)
    turn = tl.load(turns_f + f, mask=f < S.pairs, other=0)
    rest = tl.load(rest_f + f, mask=f < S.pairs, other=0.0)
    phase = (positions[:, None] * turn[None, :]).to(tl.float32)  # whole turns overflow
    return cos_and_sin(phase * RADIANS + positions.to(tl.float32)[:, None] * rest[None, :])


@triton.jit
def rotated_rows(x, channel_stride, c, s, live, S: tl.constexpr):
    """Rows after rotation, in float32 and in the order of their channels; ``live`` says which exist.

    The other channel of every pair is loaded a second time, from cache, so that no tile is put together from halves.
    """
    d = tl.arange(0, S.width)
    at = d - S.first
    second = at >= S.pairs if S.step == 1 else at % 2 == 1
    partner = tl.where(second, d - S.apart, d + S.apart)
    there = live[:, None] & (d < S.dim)[None, :]
    paired = live[:, None] & ((at >= 0) & (at < 2 * S.pairs))[None, :]
    one = tl.load(x[:, None] + d[None, :] * channel_stride, mask=there, other=0.0).to(tl.float32)
    two = tl.load(x[:, None] + partner[None, :] * channel_stride, mask=paired, other=0.0).to(tl.float32)
    return one * c + two * s


@triton.jit
def online_softmax_update(acc, row_max, row_sum, s, v, allowed, factor, cap, MASKED: tl.constexpr, S: tl.constexpr):
    """Add a block of products ``s`` and values ``v`` to the running output ``acc``, its ``row_max`` and ``row_sum``.

    The softmax is in base 2: ``factor`` holds each query's scale times log2(e).
    """
    if S.softcap:  # tanh by way of exp2; the factor includes 2 / softcap
        s = cap * (1.0 - 2.0 / (1.0 + tl.exp2(s * factor[:, None])))
        factor = tl.full(factor.shape, 1.0, tl.float32)
    if MASKED:
        s = tl.where(allowed, s, float("-inf"))
    # Factors are positive: the largest logit is the largest product, and the scaling fuses with the difference.
    new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
    anchor = new_max
    if MASKED:  # a query may have attended nothing yet
        anchor = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(s * factor[:, None] - anchor[:, None])
    rescale = tl.exp2(row_max - anchor)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(S.dot), v.to(S.dot), acc * rescale[:, None], input_precision=S.precision)
    return acc, new_max, row_sum


@triton.jit
def finished(acc, row_max, row_sum):
    """Normalised output and natural-log logsumexp; zeros and ``-inf`` for a query that attended nothing."""
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    return acc / divisor[:, None], (row_max + tl.log2(divisor)) * 0.6931471805599453
