"""What the prefill and the decode kernel share: rotation on read, logits, online softmax.

Rotary channels come in pairs, so a head is held as up to three tiles: the first channels of all pairs, the
second ones, and the rest that is not rotated. Pair ``f`` is channels ``first + f * step`` and ``apart`` further,
which covers both styles and partial rotation. Each tile is padded to a power of two on its own.

Importing this module imports triton: the backend does so on first use.

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from posenc.kernels.triton_backend import INTERPRETED
from posenc.rope import Rotary

SMALLEST = 16
"""Least extent of a tile in ``tl.dot``."""


ROOMY = 160_000
"""Bytes of shared memory (A100 and later data-centre GPUs) from which key blocks are fetched ahead."""


@dataclass(frozen=True)
class Shape:
    """Everything about the heads and tiles that a kernel is compiled for.

    Parameters
    ----------
    pairs, first, step, apart : int
        Rotary channels: pair ``f`` is channels ``first + f * step`` and ``first + f * step + apart``.
    rest : int
        Channels that are not rotated.
    value_dim : int
        Channels of the values.
    pair_tile, rest_tile, value_tile : int
        The same counts padded to what a tile may have; ``rest_tile`` is 0 where nothing rests.
    rows, keys : int
        Queries and keys of a tile.
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
    rest: int
    value_dim: int
    pair_tile: int
    rest_tile: int
    value_tile: int
    rows: int
    keys: int
    softcap: bool
    dot: tl.dtype
    precision: str

    @classmethod
    def of(cls, q_BHLD: Tensor, v_BHLD: Tensor, rotary: Rotary, *, rows: int, keys: int, softcap: bool) -> Shape:
        """The shape of a case, for tiles of ``rows`` queries and ``keys`` keys."""
        first, stop = rotary.rotated
        pairs, rest, value = len(rotary.inv_freq), q_BHLD.shape[-1] - (stop - first), v_BHLD.shape[-1]
        step, apart = (1, pairs) if rotary.style == "half" else (2, 1)
        dot = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[q_BHLD.dtype]
        if INTERPRETED:  # numpy, which it computes with, has no bfloat16
            dot = tl.float32
        precision = "tf32x3" if q_BHLD.dtype == torch.float32 else "tf32"
        tiles = padded(pairs), padded(rest) if rest else 0, padded(value)
        return cls(pairs, first, step, apart, rest, value, *tiles, rows, keys, softcap, dot, precision)


def padded(count: int) -> int:
    """The next extent that a tile may have."""
    return max(SMALLEST, int(triton.next_power_of_2(count)))


def fetched_ahead(stages: int, device: torch.device) -> int:
    """``num_stages`` for a GPU: 1 where shared memory holds no more."""
    roomy = torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= ROOMY  # type: ignore[attr-defined]
    return stages if roomy else 1


@triton.jit
def turned(x, channel_stride, cos, sin, table_rows, live, S: tl.constexpr):
    """Both channels of every pair, rotated in float32; ``x`` points at the rows, ``live`` says which exist."""
    f = tl.arange(0, S.pair_tile)
    there = live[:, None] & (f < S.pairs)[None, :]
    at = x[:, None] + (S.first + f * S.step)[None, :] * channel_stride
    one = tl.load(at, mask=there, other=0.0).to(tl.float32)
    two = tl.load(at + S.apart * channel_stride, mask=there, other=0.0).to(tl.float32)
    place = table_rows[:, None] * S.pairs + f[None, :]
    c = tl.load(cos + place, mask=there, other=0.0)
    s = tl.load(sin + place, mask=there, other=0.0)
    return one * c - two * s, two * c + one * s


@triton.jit
def unturned(x, channel_stride, live, S: tl.constexpr):
    """The channels before and behind the rotated ones."""
    c = tl.arange(0, S.rest_tile)
    channel = tl.where(c < S.first, c, c + 2 * S.pairs)
    there = live[:, None] & (c < S.rest)[None, :]
    return tl.load(x[:, None] + channel[None, :] * channel_stride, mask=there, other=0.0)


@triton.jit
def absorb(
    acc, peak, total, q1, q2, q3, k1, k2, k3, v, allowed, factor, cap, MASKED: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """One block of keys into the online softmax, in base 2: ``factor`` holds each query's scale times log2(e)."""
    s = tl.dot(q1, tl.trans(k1.to(S.dot)), input_precision=S.precision)
    s = tl.dot(q2, tl.trans(k2.to(S.dot)), s, input_precision=S.precision)
    if S.rest:
        s = tl.dot(q3, tl.trans(k3.to(S.dot)), s, input_precision=S.precision)
    s = s * factor[:, None]
    if S.softcap:  # tanh by way of exp2; the host has put a 2 / softcap into the factor
        s = cap * (1.0 - 2.0 / (1.0 + tl.exp2(s)))
    if MASKED:
        s = tl.where(allowed, s, float("-inf"))
    higher = tl.maximum(peak, tl.max(s, 1))
    anchor = higher
    if MASKED:  # a query may have attended nothing yet
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - anchor[:, None])
    fade = tl.exp2(peak - anchor)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(S.dot), v.to(S.dot), acc * fade[:, None], input_precision=S.precision)
    return acc, higher, total


@triton.jit
def finished(acc, peak, total):
    """Normalised output and natural-log logsumexp; zeros and ``-inf`` for a query that attended nothing."""
    divisor = tl.where(total == 0.0, 1.0, total)
    return acc / divisor[:, None], (peak + tl.log2(divisor)) * 0.6931471805599453
