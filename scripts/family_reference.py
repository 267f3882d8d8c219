"""A dense judge for any family that knows nothing of posenc: the model's own rotation is its only instrument.

The whole text runs once per *relative* position, as rows of one batch: in row ``r`` every token has
position ``r``, in row 0 position 0. The attention function takes the logit of a pair from the query of
row ``rel[i, j]`` and the key of row 0, so rotation style, channels, frequencies, layers without rotary
positions and the model's own mask need not be known. All rows then continue with the same output.

Shape letters: R relative positions, B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from posenc.handle import find_adapter

NAME = "dense_relative"
_relative: ContextVar[Tensor] = ContextVar("relative")


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
    """Attention in float64 with the relative positions that are set."""
    relative_LL = _relative.get()
    rows, heads, length, dim = query.shape
    groups = heads // key.shape[1]
    q_RHLD = query.double()
    k_HLD = key[0].double().repeat_interleave(groups, 0)
    v_HLD = value[0].double().repeat_interleave(groups, 0)
    seen_LL = relative_LL >= 0
    if attention_mask is not None:
        seen_LL = seen_LL & attention_mask[0, 0]
    logits_HLL = torch.zeros(heads, length, length, dtype=torch.float64)
    for row in range(rows):
        here = relative_LL == row
        logits_HLL = torch.where(here, q_RHLD[row] @ k_HLD.transpose(-1, -2), logits_HLL)
    logits_HLL = logits_HLL * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        logits_HLL = softcap * torch.tanh(logits_HLL / softcap)
    logits_HLL = logits_HLL.masked_fill(~seen_LL, float("-inf"))
    if s_aux is not None:
        logits_HLL = torch.cat((logits_HLL, s_aux.double()[:, None, None].expand(-1, length, 1)), -1)
    weights_HLL = logits_HLL.softmax(-1)[..., :length]
    out_LHD = (weights_HLL @ v_HLD).transpose(0, 1).to(query.dtype)
    return out_LHD.expand(rows, -1, -1, -1).contiguous(), None


def dense_logits(model: Any, tokens_1L: Tensor, relative_LL: np.ndarray[Any, Any]) -> Tensor:
    """Logits [L, vocab] of one row under integer relative positions (NaN where a pair is not attended)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, dense_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    relative = torch.from_numpy(np.where(np.isnan(relative_LL), -1, relative_LL)).long()
    rows, length = int(relative.max()) + 1, tokens_1L.shape[1]
    positions = torch.arange(rows)[:, None].expand(rows, length).contiguous()
    tokens = tokens_1L.expand(rows, length).contiguous()
    decoder = find_adapter(model).decoder(model)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    token = _relative.set(relative)
    try:
        with torch.no_grad():
            mask = torch.ones_like(tokens)
            logits: Tensor = model(tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits
        return logits[0]
    finally:
        _relative.reset(token)
        decoder.set_attn_implementation(before)
