"""The backend ``triton``: fused kernels in which all segments of a plan share one online softmax.

Few queries run the decode kernel, more the prefill kernel. Triton itself is imported when a kernel is first used.

Shape letters: B batch, H heads, L tokens, D head_dim, T queries of all requests, M pages of a request, K slots of a
page, N requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from posenc.backend import AttentionBackend, BackendCapabilities
from posenc.kernels.devices import aligned, on_device
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.kernels.triton.mode import INTERPRETED
from posenc.kernels.triton.requests import decode_tables
from posenc.kernels.triton.tables import Scales, prefill_tables
from posenc.kernels.triton.tiles import Kernel, TileTable, Tiling, in_force
from posenc.plan import PositionPlan
from posenc.rope import Rotary

MOST_CHANNELS = 256
MOST_HEADS = 65535
"""Most programs on the second axis of a CUDA grid."""

DECODE_QUERIES = 16
"""Most queries of the decode kernel; for more, a copy of rotated keys pays for itself within the call."""

FIRST = 25
"""The priority where these kernels are the fastest: above every library's backend."""

SMALL = {"prefill": Tiling(64, 32, 4, 1), "decode_kept": Tiling(16, 32, 4, 1), "decode_raw": Tiling(16, 32, 4, 1)}
"""Tiles under the interpreter: small, so that short inputs cross many."""


class TritonBackend(AttentionBackend):
    """Prefill over queries and keys rotated before; decoding over kept rotated keys, or over raw ones rotated on read.

    Memory beyond the inputs, in bytes, for elements of ``E`` bytes:

    - prefill: rotated keys, one copy per map, and rotated queries, one per segment, of some heads at a time: about one
      copy of queries and keys where the input is long enough to fill the GPU with some of the heads;
    - decoding over raw keys: ``4`` per key and map, which all layers share; where positions are not whole numbers,
      ``8 * head_dim / 2`` more;
    - decoding with ``kept`` rotated keys: ``E * head_dim`` per key, key/value head and map, in every layer.

    Parameters
    ----------
    tiles : TileTable, optional
        Tile sizes; default the shipped table, after the file that ``POSENC_TRITON_TILES`` names.
    """

    name = "triton"
    summary = "fused Triton kernels: every segment of a plan in one pass over the keys"
    capabilities = BackendCapabilities(
        devices=("cpu",) if INTERPRETED else ("cuda",),
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        gradients=False,
        masks=False,
        softcap=True,
        keeps_keys=True,
    )
    priority = -200 if INTERPRETED else 5

    def __init__(self, tiles: TileTable | None = None) -> None:
        self._tiles = tiles

    def priority_for(self, q_BHLD: Tensor, k_BHLD: Tensor) -> int:
        """Above every other backend in half precision, as measured, and for few queries, which take one launch."""
        half, few = q_BHLD.dtype.itemsize == 2, q_BHLD.shape[2] <= DECODE_QUERIES
        return FIRST if (half or few) and not INTERPRETED else self.priority

    def refuses(self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask: Tensor | None) -> str | None:
        """Also where triton is not installed or heads are too wide."""
        reason = super().refuses(q_BHLD, k_BHLD, v_BHLD, mask)
        if reason is not None:
            return reason
        widest, heads = max(q_BHLD.shape[-1], v_BHLD.shape[-1]), q_BHLD.shape[0] * q_BHLD.shape[1]
        if widest > MOST_CHANNELS:
            return f"it takes heads of at most {MOST_CHANNELS} channels, not {widest}"
        if heads > MOST_HEADS:
            return f"it takes at most {MOST_HEADS} heads of all batch rows together, not {heads}"
        if not _installed():
            return "triton is not installed (Linux: pip install 'posenc[triton]')"
        return _unsuited(q_BHLD.device) if q_BHLD.device.type == "cuda" else None

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
        softcap: float | None = None,
        kept: RotatedKeyCache | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        scales = Scales.of(scale, softcap)
        if q_BHLD.shape[2] <= DECODE_QUERIES:
            return self._decode(q_BHLD, k_BHLD, v_BHLD, [plan], rotary, scales, kept)
        return self._prefill(q_BHLD, k_BHLD, v_BHLD, plan, rotary, scales)

    def attend_rows(
        self,
        q_BHLD: Tensor,
        k_BHLD: Tensor,
        v_BHLD: Tensor,
        plans: Sequence[PositionPlan],
        rotary: Rotary,
        *,
        scale: float,
        mask: Tensor | None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """One launch for few queries, whatever the number of plans."""
        if q_BHLD.shape[2] > DECODE_QUERIES:
            soft = {} if softcap is None else {"softcap": softcap}
            return super().attend_rows(q_BHLD, k_BHLD, v_BHLD, plans, rotary, scale=scale, mask=mask, **soft)
        return self._decode(q_BHLD, k_BHLD, v_BHLD, plans, rotary, Scales.of(scale, softcap), None)

    def attend_paged(
        self,
        q_THD: Tensor,
        k_PHKD: Tensor,
        v_PHKD: Tensor,
        block_table_NM: Tensor,
        counts: Sequence[int],
        plans: Sequence[PositionPlan],
        rotary: Rotary,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Few queries of each of several requests, every one with a plan of its own, over raw keys in pages.

        Parameters
        ----------
        q_THD : float [T, Hq, D]
            Queries, not rotated: those of all requests, one request after the other.
        k_PHKD, v_PHKD : float [pages, Hkv, K, D]
            Keys (not rotated) and values; any strides.
        block_table_NM : int32 [N, M]
            The pages of every request, in order; what lies beyond a request's keys is not read.
        counts : sequence of int
            Queries of every request, at most ``DECODE_QUERIES``, the last of its plan's tokens; 0 for an idle request.
        plans : sequence of PositionPlan
            One per request.

        Returns
        -------
        (Tensor, Tensor)
            Output [T, Hq, Dv] in the input dtype and natural-log logsumexp, float32 [T, Hq].
        """
        assert len(counts) == len(plans) == len(block_table_NM)
        assert sum(counts) == len(q_THD)
        assert max(counts) <= DECODE_QUERIES
        assert block_table_NM.stride(1) == 1
        rotary.check_width(q_THD.shape[-1])
        from posenc.kernels.triton.decode import decode

        q_1HTD = q_THD.transpose(0, 1)[None]
        out_1HTD, lse_1HT = _outputs(q_1HTD, v_PHKD)
        tiling = self._tiling("decode_raw", q_1HTD, v_PHKD)
        with on_device(q_THD.device):
            tables = decode_tables(plans, counts, rotary, q_THD.device, ragged=True)
            decode(
                q_1HTD, k_PHKD, v_PHKD, out_1HTD, lse_1HT, tables, rotary, Scales.of(scale, softcap), tiling,
                block_table_NM=block_table_NM,
            )  # fmt: skip
        return out_1HTD[0].transpose(0, 1), lse_1HT[0].transpose(0, 1)

    def _prefill(
        self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, plan: PositionPlan, rotary: Rotary, scales: Scales
    ) -> tuple[Tensor, Tensor]:
        from posenc.kernels.triton.prefill import prefill, takes_descriptor

        rotary.check_width(q_BHLD.shape[-1])
        out_BHLD, lse_BHL = _outputs(q_BHLD, v_BHLD)
        with on_device(q_BHLD.device):
            tables = prefill_tables(plan, q_BHLD.shape[2], rotary, q_BHLD.device)
            if tables is None:
                return out_BHLD.zero_(), lse_BHL.fill_(float("-inf"))
            tiling = self._tiling("prefill", q_BHLD, v_BHLD)
            if tiling.tma:
                v_BHLD = aligned(v_BHLD)
                tiling = replace(tiling, tma=takes_descriptor(v_BHLD))
            prefill(q_BHLD, k_BHLD, v_BHLD, out_BHLD, lse_BHL, tables, rotary, scales, tiling)
        return out_BHLD, lse_BHL

    def _decode(
        self,
        q_BHLD: Tensor,
        k_BHLD: Tensor,
        v_BHLD: Tensor,
        plans: Sequence[PositionPlan],
        rotary: Rotary,
        scales: Scales,
        kept: RotatedKeyCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Few queries: over the rotated keys that ``kept`` holds where a launch can take them, else over raw keys."""
        from posenc.kernels.triton.decode import MOST_COPIES, decode
        from posenc.kernels.triton.rotate import kept_copies

        rotary.check_width(q_BHLD.shape[-1])
        out_BHLD, lse_BHL = _outputs(q_BHLD, v_BHLD)
        keys: Tensor | Sequence[Tensor] = k_BHLD
        kernel: Kernel = "decode_raw"
        with on_device(q_BHLD.device):
            tables = decode_tables(plans, [q_BHLD.shape[2]] * len(plans), rotary, q_BHLD.device)
            if kept is not None and 1 <= len(tables.copies) <= MOST_COPIES and k_BHLD.stride(-1) == 1:
                keys, kernel = kept_copies(k_BHLD, tables.copies, rotary, kept), "decode_kept"
            tiling = self._tiling(kernel, q_BHLD, v_BHLD)
            decode(q_BHLD, keys, v_BHLD, out_BHLD, lse_BHL, tables, rotary, scales, tiling)
        return out_BHLD, lse_BHL

    def _tiling(self, kernel: Kernel, q_BHLD: Tensor, v_BHLD: Tensor) -> Tiling:
        if INTERPRETED and self._tiles is None:
            return SMALL[kernel]
        table = in_force() if self._tiles is None else self._tiles
        width = max(q_BHLD.shape[-1], v_BHLD.shape[-1])
        return table.tiling(kernel, capability=_capability(q_BHLD.device), dtype=q_BHLD.dtype, head_dim=width)


def _outputs(q_BHLD: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the output, laid out as models want it, [B, L, H, D], and for the logsumexp."""
    batch, heads, q_len, _ = q_BHLD.shape
    out_BHLD = q_BHLD.new_empty(batch, q_len, heads, v_BHLD.shape[-1]).transpose(1, 2)
    return out_BHLD, q_BHLD.new_empty(batch, heads, q_len, dtype=torch.float32)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Compute capability; the interpreter runs what an H100 would."""
    return (9, 0) if INTERPRETED else torch.cuda.get_device_capability(device)


@cache
def _unsuited(device: torch.device) -> str | None:
    """Why the kernels do not fit this GPU, if they do not."""
    if torch.version.hip is not None:
        return "its tiles are made for NVIDIA GPUs"
    major, minor = _capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0 or newer, and {device} has {major}.{minor}"
