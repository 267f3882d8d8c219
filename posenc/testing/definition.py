"""Attention by its definition, in float64, from the relative positions alone.

Neither query nor key is rotated here: a logit is the sum over frequencies of
``(q . k) cos(f r) + (q x k) sin(f r)``, so no code is shared with any backend or with ``Rotary.rotate``.
In a segment that interpolates logits, a logit is the weighted sum of such logits at whole positions.

Shape letters: B batch, H query heads, L queries or keys, D head_dim, F rotary frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posenc.plan import PositionPlan
from posenc.rope import Rotary
from posenc.testing.dense import DensePlan, mixture


def logits_by_definition(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    plan: PositionPlan,
    rotary: Rotary,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Logits of every pair, float64 [B, Hq, Lq, Lk]; ``-inf`` where the pair is not attended."""
    q = q_BHLD.double()
    k = k_BHLD.double().repeat_interleave(q_BHLD.shape[1] // k_BHLD.shape[1], 1)
    dense, first = DensePlan.of(plan), plan.total - q.shape[2]
    parts = [[torch.from_numpy(x[first:].copy()).to(q.device) for x in part] for part in mixture(plan)]
    start, stop = rotary.rotated
    count = len(rotary.inv_freq)
    rest = [c for c in range(q.shape[-1]) if not start <= c < stop]
    logits = q[..., rest] @ k[..., rest].transpose(-1, -2)
    for f in range(count):
        one, two = (start + f, start + f + count) if rotary.style == "half" else (start + 2 * f, start + 2 * f + 1)
        q1, q2, k1, k2 = q[..., one, None], q[..., two, None], k[..., None, :, one], k[..., None, :, two]
        for weight_LLF, relative_LLF in parts:
            angle = rotary.inv_freq[f].double().to(q.device) * relative_LLF[..., f % relative_LLF.shape[-1]]
            weight = rotary.attention_scaling**2 * weight_LLF[..., f % weight_LLF.shape[-1]]
            logits = logits + weight * ((q1 * k1 + q2 * k2) * angle.cos() + (q1 * k2 - q2 * k1) * angle.sin())
    logits = logits * torch.from_numpy(dense.scale[first:].copy()).to(q.device)[:, None] * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    attended = torch.from_numpy(dense.owner[first:] >= 0).to(q.device)
    return logits.masked_fill(~(attended if mask is None else attended & mask), float("-inf"))


def attend_by_logits(logits_BHLL: Tensor, v_BHLD: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention and logsumexp in float64; zeros and ``-inf`` for a query that attends nothing."""
    v = v_BHLD.double().repeat_interleave(logits_BHLL.shape[1] // v_BHLD.shape[1], 1)
    lse = logits_BHLL.logsumexp(-1)
    weights = (logits_BHLL - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()
    return weights @ v, lse


def attention_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PositionPlan,
    rotary: Rotary,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What :func:`posenc.attention` must return for one plan, in float64: the reference for every backend.

    Returns
    -------
    (Tensor, Tensor)
        Output [B, Hq, Lq, Dv] and natural-log logsumexp [B, Hq, Lq], both float64 and differentiable.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return attend_by_logits(logits_by_definition(q, k, plan, rotary, scale=scale, mask=mask, softcap=softcap), v)
