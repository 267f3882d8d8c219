"""One query per head over rotated keys, in plain tensor operations: torch.compile traces them into one graph.

Shape letters: B batch, R rows (1 where all are alike), H heads, G query heads per key head, K keys, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from posenc.kernels.rotated import compute_dtype


def attend_traced(
    q_BH1D: Tensor,
    k_BHKD: Tensor,
    v_BHKD: Tensor,
    seen_RK: Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Softmax attention of one query per head.

    The query heads that share a key head are rows of one product.

    Parameters
    ----------
    q_BH1D, k_BHKD, v_BHKD : Tensor
        Rotated queries and keys, and values.
    seen_RK : bool [R, K]
        True where the query attends.
    scaling : float, optional
        Factor on the logits, ``D ** -0.5`` by default.
    softcap : float, optional
        Logits become ``softcap * tanh(logits / softcap)``.
    sinks_H : float [H], optional
        One more logit per head that carries no value.

    Returns
    -------
    Tensor
        Output [B, H, 1, D].
    """
    batch, heads, _, dim = q_BH1D.shape
    scaling = dim**-0.5 if scaling is None else scaling
    q_BHGD = q_BH1D.reshape(batch, k_BHKD.shape[1], -1, dim)
    seen_R11K = seen_RK[:, None, None]
    if softcap is None and sinks_H is None:
        out_BHGD = F.scaled_dot_product_attention(q_BHGD, k_BHKD, v_BHKD, attn_mask=seen_R11K, scale=scaling)
        return out_BHGD.reshape(batch, heads, 1, -1)
    precise = compute_dtype(q_BH1D)
    logits_BHGK = q_BHGD.to(precise) @ k_BHKD.to(precise).transpose(-1, -2) * scaling
    if softcap is not None:
        logits_BHGK = softcap * torch.tanh(logits_BHGK / softcap)
    logits_BHGK = logits_BHGK.masked_fill(~seen_R11K, float("-inf"))
    if sinks_H is not None:
        sinks_BHG1 = sinks_H.to(precise).reshape(1, k_BHKD.shape[1], -1, 1).expand(batch, -1, -1, -1)
        logits_BHGK = torch.cat((logits_BHGK, sinks_BHG1), -1)
    weights_BHGK = logits_BHGK.softmax(-1)[..., : k_BHKD.shape[2]]
    return (weights_BHGK @ v_BHKD.to(precise)).to(v_BHKD.dtype).reshape(batch, heads, 1, -1)
