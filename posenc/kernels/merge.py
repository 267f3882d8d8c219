"""Merge attention over disjoint sets of keys by logsumexp.

Shape letters: B batch, H query heads, L queries, D head_dim of the values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out_a_BHLD: Tensor, lse_a_BHL: Tensor, out_b_BHLD: Tensor, lse_b_BHL: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets.

    Associative and commutative; a side that attended nothing has ``lse = -inf`` and drops out, also
    when both did. Natural logarithm.

    Parameters
    ----------
    out_a_BHLD, out_b_BHLD : float [..., L, D]
        Outputs normalised over their own keys.
    lse_a_BHL, lse_b_BHL : float [..., L]
        Their logsumexp.

    Returns
    -------
    (Tensor, Tensor)
        Output and logsumexp of the union.
    """
    weight_BHL, lse_BHL = _weight(lse_a_BHL, lse_b_BHL)
    return torch.lerp(out_a_BHLD, out_b_BHLD, weight_BHL[..., None]), lse_BHL


def merge_into(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor, *, first: bool) -> None:
    """Merge a result into views of a running ``(out, lse)``, in place; ``first`` says that nothing is there yet."""
    if first:
        out.copy_(new_out)
        lse.copy_(new_lse)
        return
    weight, union_lse = _weight(lse, new_lse.to(lse.dtype))
    out.lerp_(new_out.to(out.dtype), weight[..., None])
    lse.copy_(union_lse)


def merge_all(outs_NBHLD: Tensor, lses_NBHL: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of N disjoint key sets, each of which every query attends: few operations."""
    if len(outs_NBHLD) == 2:
        (out_a, out_b), (lse_a, lse_b) = outs_NBHLD.to(lses_NBHL.dtype).unbind(), lses_NBHL.unbind()
        out = torch.lerp(out_a, out_b, torch.sigmoid(lse_b - lse_a)[..., None])
        return out.to(outs_NBHLD.dtype), torch.logaddexp(lse_a, lse_b)
    lse_BHL = lses_NBHL.logsumexp(0)
    shares_NBHL = (lses_NBHL - lse_BHL).exp_()
    return (outs_NBHLD * shares_NBHL[..., None]).sum(0).to(outs_NBHLD.dtype), lse_BHL


def _weight(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Share of ``b`` in the union (0 where neither attended anything) and the union's logsumexp."""
    union_lse = torch.logaddexp(lse_a, lse_b)
    return (lse_b - union_lse.masked_fill(union_lse == float("-inf"), 0.0)).exp(), union_lse
