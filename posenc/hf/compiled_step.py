"""Decode one token on a static cache in plain tensor operations, which torch.compile traces in one graph.

:class:`CompiledStep` takes the place of :class:`~posenc.hf.step.Step` if the eager forward before it could build the
cache's decode tables (``posenc/hf/cache/decode_tables.py``). For one query every key lies in one segment. So one table
per step says by which angle each key is rotated relative to the query, and one softmax over raw queries and rotated
keys is the result (``posenc/kernels/traced_query.py``), whatever the number of segments.

Shape letters: B batch, R rows (1 if all are alike), N plans, H heads, K cache slots handed to a layer, T cache slots, M
slots of the mask, S segments, D head_dim, F frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import tau
from typing import Any

import torch
from torch import Tensor

from posenc.errors import UnsupportedModelError
from posenc.hf.attachment import Attachment
from posenc.hf.cache.decode_tables import LayerKind, StaticDecodeTables
from posenc.hf.cache.state import CacheState
from posenc.hf.layer_call import LayerCall
from posenc.hf.step import refuse_options
from posenc.hf.transformers_names import cache_of
from posenc.kernels.rotated import compute_dtype
from posenc.kernels.traced_query import attend_traced

BROKEN = (
    "posenc: a compiled decode step does not continue from where its cache stands: another model or a detached one "
    "filled the cache, the token is padding, its position id does not count up by one, or the mask changed. Run the "
    "same step without torch.compile for the exact reason."
)
OVERFLOW = "posenc: float16 overflow: a rotated key exceeds 65504. Run the model in bfloat16 or float32."


@dataclass
class CompiledStep:
    """What the attention layers need for one decoded token, in tensors alone.

    Parameters
    ----------
    tables : StaticDecodeTables
        Plans of every row until the cache is full.
    slot : int64 []
        Slot of the new token.

    Attributes
    ----------
    query_R : int64 [R]
        Which of its row's real tokens the new token is.
    plan_R : int64 [R]
        Which plan it uses.
    """

    tables: StaticDecodeTables
    slot: Tensor
    _rotations: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tables = self.tables
        rows = torch.arange(tables.index_RT.shape[0], device=self.slot.device)
        self.query_R = tables.index_RT.index_select(1, self.slot[None])[:, 0]
        self.plan_R = tables.plan_RT[rows, self.query_R]

    def attend(self, call: LayerCall) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of one layer on a raw query and raw keys; output [B, 1, H, D], as transformers expects.

        Raises
        ------
        UnsupportedModelError
            If the layer was not probed.
        BackendError
            If the call asks for an option that a remapped layer does not compute.
        """
        q_BH1D, k_BHKD = call.q_BHLD, call.k_BHKD
        tables = self.tables
        index = tables.kind_of.get(call.module)
        if index is None:
            raise UnsupportedModelError(f"{type(call.module).__name__} attends in this forward, but it was not probed.")
        kind = tables.kinds[index]
        if kind.stock:
            q, k = q_BH1D, k_BHKD
            if kind.rotary is not None:
                ids_BT = tables.position_ids_BT.to(q.device)
                slots_K = self._slots(k.shape[2]).to(q.device)
                q = kind.rotary.rotate_as_stock(q, ids_BT.index_select(1, self.slot[None].to(q.device)))
                k = kind.rotary.rotate_as_stock(k, ids_BT.index_select(1, slots_K))
            return call.run(tables.stock, q, k)
        refuse_options(call.dropout, call.options)
        assert kind.rotary is not None
        dtype = compute_dtype(k_BHKD)
        rotation = self._rotation(index, k_BHKD.shape[2], dtype)
        cos_RKF, sin_RKF, seen_RK = (x.to(q_BH1D.device) for x in rotation)
        rotated_BHKD = kind.rotary.rotate(k_BHKD, cos_RKF[:, None], sin_RKF[:, None])
        if k_BHKD.dtype == torch.float16:
            torch._assert_async(rotated_BHKD.isfinite().all() | ~k_BHKD.isfinite().all(), OVERFLOW)
        if tables.scale_NT is not None:
            scale_R = tables.scale_NT[self.plan_R, self.query_R].to(q_BH1D.device, dtype)
            q_BH1D = (q_BH1D * scale_R[:, None, None, None]).to(q_BH1D.dtype)
        softcap, sinks = call.options.get("softcap"), call.options.get("s_aux")
        out_BH1D = attend_traced(q_BH1D, rotated_BHKD, call.v_BHKD, seen_RK, call.scaling, softcap, sinks)
        return out_BH1D.transpose(1, 2), None

    def _slots(self, count: int) -> Tensor:
        """Return the slots of the keys handed to a layer: all slots, or the last ones of a sliding cache, int64 [K]."""
        return torch.arange(count, device=self.slot.device) + (self.slot + 1 - count).clamp(min=0)

    def _rotation(self, index: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Return cos and sin [R, K, F] that rotate the keys, and which keys are seen [R, K]; computed once per step."""
        key = (index, keys)
        if key not in self._rotations:
            self._rotations[key] = self._make_rotation(self.tables.kinds[index], keys, dtype)
        return self._rotations[key]

    def _make_rotation(self, kind: LayerKind, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        tables, plan_R, query_R = self.tables, self.plan_R, self.query_R
        slots_K = self._slots(keys)
        key_RK = tables.index_RT.index_select(1, slots_K)
        start_RS, stop_RS = tables.key_start_NTS[plan_R, query_R], tables.key_stop_NTS[plan_R, query_R]
        inside_RKS = (key_RK[..., None] >= start_RS[:, None]) & (key_RK[..., None] < stop_RS[:, None])
        seen_RK = inside_RKS.any(-1) & tables.real_RT.index_select(1, slots_K) & (slots_K <= self.slot)
        if kind.sliding_window is not None:
            seen_RK = seen_RK & (query_R[:, None] - key_RK < kind.sliding_window)
        query_RS = tables.query_NTS[plan_R, query_R]
        key_RKS = tables.key_NTS[plan_R[:, None], key_RK]
        relative_RKS = key_RKS - query_RS[:, None]
        relative_RKSF = relative_RKS if relative_RKS.ndim == 4 else relative_RKS[..., None]
        relative_RKF = torch.where(inside_RKS[..., None], relative_RKSF, 0.0).sum(2)
        angle_RKF = relative_RKF * kind.inv_freq_NF[plan_R][:, None]
        angle_RKF = angle_RKF - tau * (angle_RKF / tau).round()  # within half a turn, so that float32 is precise
        angle_RKF = angle_RKF.to(dtype)
        factor_R11 = kind.factor_N[plan_R].square()[:, None, None].to(dtype)
        return angle_RKF.cos() * factor_R11, angle_RKF.sin() * factor_R11, seen_RK


def compiled_step(attachment: Attachment, kwargs: dict[str, Any], tokens: Tensor) -> CompiledStep | None:
    """Make the step of one decoded token, and count the token in the cache's tables.

    Parameters
    ----------
    attachment : Attachment
        What the hooks of the model share.
    kwargs : dict
        Keyword arguments of the decoder's forward.
    tokens : Tensor
        Ids [B, L] or embeddings [B, L, hidden] of the new tokens.

    Returns
    -------
    CompiledStep or None
        None if the forward must run the ordinary way, with graph breaks: the cache has no tables, or the forward is not
        one more token under the same strategy.

    Raises
    ------
    RuntimeError
        When the graph runs, if the token does not continue from where the cache stands.
    """
    cache = cache_of(kwargs)
    tables = None if cache is None else CacheState.of(cache).tables
    if not isinstance(tables, StaticDecodeTables) or tokens.shape[1] != 1 or attachment.open_announcements:
        return None
    batch, slots = tables.position_ids_BT.shape
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if tables.fingerprint != attachment.fingerprint or batch != tokens.shape[0]:
        return None
    if mask is not None and (mask.shape[-1] != slots if mask.ndim == 4 else mask.ndim != 2):
        return None
    slot = tables.count.clone()
    ids = kwargs.get("position_ids")
    ids_B1 = (slot[None, None] if ids is None else ids).expand(batch, 1)
    torch._assert_async(_continues(tables, slot, ids_B1, mask) & (slot == cache.get_seq_length()), BROKEN)
    tables.position_ids_BT.index_copy_(1, slot[None], ids_B1)
    tables.count.add_(1)
    return CompiledStep(tables, slot)


def _continues(tables: StaticDecodeTables, slot: Tensor, ids_B1: Tensor, mask: Tensor | None) -> Tensor:
    """Return whether mask and position ids of the new token are those of one more real token, bool []."""
    real_RT = tables.real_RT
    slots_T = torch.arange(real_RT.shape[1], device=slot.device)
    valid = slot < real_RT.shape[1]
    if not all(kind.stock for kind in tables.kinds):
        last = (slot - 1).clamp(min=0)[None]
        counts_up = ids_B1 == tables.position_ids_BT.index_select(1, last) + 1
        valid = valid & (counts_up | ~real_RT.index_select(1, last)).all()
    if mask is None:
        return valid
    if mask.ndim == 2:
        shown_BM = mask[:, : len(slots_T)].bool()
        filled_M = slots_T[: shown_BM.shape[1]] <= slot
        same = ((shown_BM == real_RT[:, : shown_BM.shape[1]]) | ~filled_M).all()
        return valid & (slot < shown_BM.shape[1]) & same
    shown_BT = mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] >= 0
    causal_RT = real_RT & (slots_T <= slot)
    same = (shown_BT == causal_RT).all()
    for width in dict.fromkeys(kind.sliding_window for kind in tables.kinds if kind.sliding_window is not None):
        same = same | (shown_BT == causal_RT & (slot - slots_T < width)).all()
    return valid & same
