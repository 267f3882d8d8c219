"""Merging attention over disjoint key sets by logsumexp.

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
    lse_BHL = torch.logaddexp(lse_a_BHL, lse_b_BHL)
    anchor = lse_BHL.masked_fill(lse_BHL == float("-inf"), 0.0)  # exp(-inf - 0) = 0 where nothing was attended
    weight_a, weight_b = (lse_a_BHL - anchor).exp(), (lse_b_BHL - anchor).exp()
    return out_a_BHLD * weight_a[..., None] + out_b_BHLD * weight_b[..., None], lse_BHL


def merge_into(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor, *, first: bool) -> None:
    """Merge a piece into views of a running ``(out, lse)``; ``first`` says that nothing is there yet."""
    if not first:
        new_out, new_lse = merge(out, lse, new_out.to(out.dtype), new_lse.to(lse.dtype))
    out.copy_(new_out)
    lse.copy_(new_lse)
