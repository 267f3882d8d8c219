"""A dense judge for any model, which uses only the model's own rotation and no code of posenc's backends.

The whole text runs once per query, as rows of one batch: row ``i`` is the text as query ``i`` sees it,
with token ``j`` at position ``i - relative[i, j]``. The attention function takes query ``i`` and its keys
from row ``i``, so it need not know the rotation style, channels, frequencies, layers without rotary positions,
scales by position, or the model's own mask. All rows then continue with the same output.

Shape letters: H heads, L tokens (and rows: one per query), D head_dim.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posenc.hf.apply import find_adapter
from posenc.hf.stock import register

NAME = "dense_relative"
_attended: ContextVar[Tensor] = ContextVar("attended")


def dense_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention in float64, with each query taken from its own row."""
    length, heads, _, dim = query.shape
    groups = heads // key.shape[1]
    index = torch.arange(length)
    q_LHD = query.double()[index, :, index]
    k_LHLD = key.double().repeat_interleave(groups, 1)
    v_HLD = value[0].double().repeat_interleave(groups, 0)
    attended_LL = _attended.get()
    if attention_mask is not None:
        attended_LL = attended_LL & attention_mask[0, 0]
    logits_HLL = torch.einsum("ihd,ihjd->hij", q_LHD, k_LHLD) * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits_HLL = softcap * torch.tanh(logits_HLL / softcap)
    logits_HLL = logits_HLL.masked_fill(~attended_LL, float("-inf"))
    if s_aux is not None:
        logits_HLL = torch.cat((logits_HLL, s_aux.double()[:, None, None].expand(-1, length, 1)), -1)
    weights_HLL = logits_HLL.softmax(-1)[..., :length]
    out_LHD = (weights_HLL @ v_HLD).transpose(0, 1).to(query.dtype)
    return out_LHD.expand(length, -1, -1, -1).contiguous(), None


def dense_logits(model: Any, tokens_1L: Tensor, relative_LL: np.ndarray[Any, Any]) -> Tensor:
    """Logits [L, vocab] of one text under integer relative positions (NaN where a pair is not attended)."""
    register(NAME, dense_attention)
    relative = torch.from_numpy(relative_LL)
    index = torch.arange(tokens_1L.shape[1])
    positions_LL = torch.where(relative.isnan(), index.double(), index[:, None] - relative).long()
    tokens_LL = tokens_1L.expand(len(index), -1).contiguous()
    decoder: Any = find_adapter(model).decoder(model)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    token = _attended.set(~relative.isnan())
    try:
        with torch.no_grad():
            mask = torch.ones_like(tokens_LL)
            logits: Tensor = model(tokens_LL, position_ids=positions_LL, attention_mask=mask, use_cache=False).logits
        return logits[0]
    finally:
        _attended.reset(token)
        decoder.set_attn_implementation(before)
