"""Run a plan on a kernel that takes a window: the base of the backends for CUDA libraries.

Shape letters: B batch, H heads, L tokens, R and K queries and keys of one call, D head_dim.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posenc.backend import AttentionBackend, BackendCapabilities
from posenc.kernels.devices import aligned, on_device
from posenc.kernels.merge import merge
from posenc.kernels.rotated import rotated_keys, rotated_queries, rotation_layout
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.kernels.windowed.bands import BandCall, band_schedule
from posenc.plan import PositionPlan
from posenc.rope import Rotary

ALIGNMENT = 8
"""The kernels load channels in blocks of this many."""

WIDEST = 256
"""Most channels of a head that flash attention takes."""

OutLse = tuple[Tensor, Tensor]
"""Output [B, R, H, D] and logsumexp float32 [B, H, R]."""


class WindowedBackend(AttentionBackend):
    """One kernel call per band of a plan; a subclass makes the call, and may merge faster."""

    capabilities = BackendCapabilities(
        devices=("cuda",),
        dtypes=(torch.bfloat16, torch.float16),
        gradients=False,
        masks=False,
        keeps_keys=True,
    )

    @abstractmethod
    def window(
        self, q_BRHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, *, left: int | None, right: int | None, scale: float
    ) -> OutLse:
        """Attention through a window, as :class:`~posenc.kernels.windowed.bands.Band` defines it.

        Every query sees a key. ``right`` is 0 or None. Heads of keys and values may be fewer than those of queries.
        The last dimension of each tensor is contiguous; its address and its other strides are multiples of 16 bytes.
        The tensors' GPU is the current one.
        """

    def unavailable(self, q_BHLD: Tensor) -> str | None:
        """Why the library or the device at hand cannot run this dtype, or None when they can."""
        return None

    def merged(self, parts: Sequence[OutLse]) -> OutLse:
        """Merge at least two results over the same queries."""
        (out, lse), *rest = parts
        out = out.transpose(1, 2).float()
        for other_out, other_lse in rest:
            out, lse = merge(out, lse, other_out.transpose(1, 2).float(), other_lse)
        return out.transpose(1, 2), lse

    def refuses(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None) -> str | None:
        """Also where the library is unavailable, or heads are too wide."""
        width = max(q_BHLD.shape[-1], v_BHLD.shape[-1])
        reason = super().refuses(q_BHLD, k_BHLD, v_BHLD, mask) or self.unavailable(q_BHLD)
        if reason is None and width > WIDEST:
            return f"it takes heads of up to {WIDEST} channels, not {width}"
        return reason

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
        kept: RotatedKeyCache | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        batch, heads, q_len, _ = q_BHLD.shape
        layout, schedule = rotation_layout(plan, q_len), band_schedule(plan, q_len)
        width, value_dim = padded_width(q_BHLD, v_BHLD), v_BHLD.shape[-1]
        with on_device(q_BHLD.device):
            queries = [_for_kernel(rotated_queries(copy, q_BHLD, rotary), width) for copy in layout.queries]
            keys = [_for_kernel(rotated_keys(copy, k_BHLD, rotary, kept), width) for copy in layout.keys]
            values = _for_kernel(v_BHLD, width)
            parts = [
                self._run(call, queries[call.query_copy], keys[call.key_copy], values, scale) for call in schedule.calls
            ]
            out_BLHD = values.new_zeros((batch, q_len, heads, value_dim))
            lse_BHL = torch.full((batch, heads, q_len), float("-inf"), dtype=torch.float32, device=q_BHLD.device)
            for rows, numbers in schedule.merges:
                same_rows = [_rows_of(parts[n], schedule.calls[n], rows) for n in numbers]
                out, lse = same_rows[0] if len(same_rows) == 1 else self.merged(same_rows)
                out_BLHD[:, rows] = out[..., :value_dim]
                lse_BHL[:, :, rows] = lse
        return out_BLHD.transpose(1, 2), lse_BHL

    def _run(self, call: BandCall, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, scale: float) -> OutLse:
        q, k, v = q_BLHD[:, slice(*call.band.rows)], k_BLHD[:, slice(*call.band.keys)], v_BLHD[:, call.values]
        if call.allowed is not None:
            return attend_allowed(q, k, v, torch.from_numpy(call.allowed).to(q.device), scale)
        return self.window(q, k, v, left=call.band.left, right=call.band.right, scale=scale)


def attend_allowed(q_BRHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor, allowed_RK: Tensor, scale: float) -> OutLse:
    """Dense attention over the allowed pairs, in float32: for the few bands that follow no window."""
    groups = k_BKHD.shape[2]
    q = q_BRHD.float().view(*q_BRHD.shape[:2], groups, -1, q_BRHD.shape[3])
    logits = torch.einsum("brghd,bkgd->bghrk", q, k_BKHD.float()) * scale
    logits = logits.masked_fill(~allowed_RK, float("-inf"))
    lse = logits.logsumexp(-1)
    out = torch.einsum("bghrk,bkgd->brghd", (logits - lse[..., None]).exp(), v_BKHD.float())
    return out.flatten(2, 3).to(q_BRHD.dtype), lse.flatten(1, 2)


def padded_width(q_BHLD: Tensor, v_BHLD: Tensor) -> int:
    """Channels of every head of a call: those of query or value, up to a multiple of 8."""
    return -max(q_BHLD.shape[-1], v_BHLD.shape[-1]) // ALIGNMENT * -ALIGNMENT


def _for_kernel(x_BHLD: Tensor, width: int) -> Tensor:
    """[B, L, H, D] with zero channels up to ``width``; a view where none is missing and the kernel can load it."""
    missing = width - x_BHLD.shape[-1]
    x = F.pad(x_BHLD, (0, missing)) if missing else x_BHLD
    return aligned(x).transpose(1, 2)


def _rows_of(part: OutLse, call: BandCall, rows: slice) -> OutLse:
    """A call's results for some of its queries."""
    inside = slice(rows.start - call.rows.start, rows.stop - call.rows.start)
    return part[0][:, inside], part[1][:, :, inside]
