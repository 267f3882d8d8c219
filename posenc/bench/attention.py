"""The ``attention`` and ``query`` cases: attention on raw tensors, rotation included on both sides.

Shape letters: B batch, H heads, L tokens, D head_dim, F rotary frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import posenc
from posenc.bench.cases import BenchCase
from posenc.bench.shapes import Heads
from posenc.bench.timing import Pair
from posenc.kernels.rotated_key_cache import RotatedKeyCache

THETA = 1e4


def stock_tables(positions_L: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Compute cos and sin [L, D] as transformers does."""
    inv_freq_F = 1.0 / (THETA ** (torch.arange(0, dim, 2, dtype=torch.float, device=positions_L.device) / dim))
    angle_LF = positions_L[:, None].float() * inv_freq_F
    angle_LD = torch.cat((angle_LF, angle_LF), dim=-1)
    return angle_LD.cos(), angle_LD.sin()


def stock_rotate(x_BHLD: Tensor, cos_LD: Tensor, sin_LD: Tensor) -> Tensor:
    """Rotate as the models of transformers do: a baseline that no change in posenc affects."""
    first, second = x_BHLD.chunk(2, dim=-1)
    cos, sin = cos_LD.to(x_BHLD.dtype), sin_LD.to(x_BHLD.dtype)
    return x_BHLD * cos + torch.cat((-second, first), dim=-1) * sin


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Call torch's attention; on a GPU always its flash kernel, even if torch would choose another one."""
    if q.device.type == "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


@dataclass
class PlainAttention:
    """Stock attention: rotation, then one causal SDPA call.

    The first call computes the tables and keeps them, as a model computes them once for all of its layers.
    """

    q_BHLD: Tensor
    k_BHLD: Tensor
    v_BHLD: Tensor
    _tables: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    def __call__(self) -> Tensor:
        return flash_attention(*self.rotated(), causal=True)

    def rotated(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that the kernel gets: rotated queries, rotated keys, values."""
        if self._tables is None:
            index = torch.arange(self.q_BHLD.shape[2], device=self.q_BHLD.device)
            self._tables = stock_tables(index, self.q_BHLD.shape[3])
        q, k = (stock_rotate(x, *self._tables) for x in (self.q_BHLD, self.k_BHLD))
        return q, k, self.v_BHLD


@dataclass
class PlainQuery:
    """Stock decoding: the cache holds rotated keys, so only the newest token is rotated."""

    q_BHLD: Tensor
    k_BHLD: Tensor
    v_BHLD: Tensor

    def __post_init__(self) -> None:
        length, dim = self.k_BHLD.shape[2:]
        index = torch.arange(length, device=self.k_BHLD.device)
        self._newest = self.k_BHLD[:, :, -1:].clone()
        self._tables = stock_tables(index[-1:], dim)
        self._cache = stock_rotate(self.k_BHLD, *stock_tables(index, dim))

    def __call__(self) -> Tensor:
        return flash_attention(*self.rotated(), causal=False)

    def rotated(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors that the kernel gets: rotated queries, rotated keys, values."""
        self._cache[:, :, -1:] = stock_rotate(self._newest, *self._tables)
        return stock_rotate(self.q_BHLD, *self._tables), self._cache, self.v_BHLD


def build(case: BenchCase) -> Pair:
    """Build both sides of an ``attention`` or ``query`` case, on the same random tensors."""
    heads, dtype = Heads.parse(case.shape), getattr(torch, case.dtype)
    generator = torch.Generator(case.device).manual_seed(0)

    def random(count: int, length: int) -> Tensor:
        return torch.randn(1, count, length, heads.dim, generator=generator, dtype=dtype, device=case.device)

    decoding = case.kind == "query"
    q = random(heads.query, 1 if decoding else case.length)
    k, v = random(heads.key, case.length), random(heads.key, case.length)
    base = posenc.Rotary.from_theta(THETA, heads.dim)
    strategy = case.make_strategy()
    plan = strategy.plan(case.length)
    rotated_keys = RotatedKeyCache() if decoding and case.cache == "rotated" else None
    remapped = partial(_attention, q, k, v, plan, strategy.rotary(base, case.length), case.backend, rotated_keys)
    return Pair((PlainQuery if decoding else PlainAttention)(q, k, v), remapped)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: posenc.PositionPlan,
    rotary: posenc.Rotary,
    backend: str,
    rotated_keys: RotatedKeyCache | None,
) -> Tensor:
    if rotated_keys is not None:
        rotated_keys.truncate(k.shape[2] - 1)  # as in decoding, the newest key is not rotated yet
    out = posenc.attention(q, k, v, plan, rotary, backend=backend, kept=rotated_keys)
    assert isinstance(out, Tensor)
    return out
