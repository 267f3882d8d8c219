"""The definition that judges the backends, compared with plain Python loops over pairs."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posenc.plan import PositionPlan
from posenc.rope import Rotary
from posenc.segment import Segment
from posenc.testing import attention_by_definition, random_plans
from posenc.testing.tensors import difference, tensors


def loops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PositionPlan, inv_freq: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by loops over pairs, interpolating between integer positions; half style, scale 0.7."""
    batch, heads, q_len, dim = q.shape
    total, groups, half = plan.total, heads // k.shape[1], dim // 2
    out = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, q_len), -math.inf, dtype=torch.float64)
    for b, h, row in np.ndindex(batch, heads, q_len):
        i = total - q_len + row
        logits = {}
        for j in range(i + 1):
            seen = [s for s in plan.segments if s.key_start[i] <= j < s.key_stop[i]]
            if not seen or not mask[b, 0, row, j]:
                continue
            query, key = q[b, h, row].double(), k[b, h // groups, j].double()
            dot = 0.0
            for c in range(half):
                for weight, relative in seen_at(seen[0], i, j, c):
                    turn = float(inv_freq[c]) * relative
                    dot += weight * float(query[c] * key[c] + query[c + half] * key[c + half]) * math.cos(turn)
                    dot += weight * float(query[c] * key[c + half] - query[c + half] * key[c]) * math.sin(turn)
            logits[j] = dot * 0.7 * (1.0 if plan.query_scale is None else float(plan.query_scale[i]))
        if logits:
            values = torch.tensor(list(logits.values()), dtype=torch.float64)
            lse[b, h, row] = values.logsumexp(0)
            out[b, h, row] = values.softmax(0) @ v[b, h // groups, list(logits)].double()
    return out, lse


def seen_at(segment: Segment, i: int, j: int, c: int) -> list[tuple[float, float]]:
    """Return the weights and relative positions of one pair at one frequency."""
    q, k = (float(np.broadcast_to(p, 2)[c]) for p in (segment.query_positions[i], segment.key_positions[j]))
    if segment.interpolation == "positions":
        return [(1.0, q - k)]
    sides = [[(1 - p % 1, p // 1), (p % 1, p // 1 + 1)] for p in (q, k)]
    return [(a * b, one - other) for a, one in sides[0] for b, other in sides[1]]


@settings(max_examples=25)
@given(random_plans(max_total=14, frequencies=2, interpolated=True), st.integers(0, 13), st.booleans())
def test_the_definition_equals_plain_loops(plan: PositionPlan, cut: int, masked: bool) -> None:
    q_len = max(1, plan.total - cut)
    q, k, v = tensors(plan, q_len, (4, 2), 4, batch=1)
    rotary = Rotary.from_theta(50.0, 4)
    mask = torch.rand(1, 1, q_len, plan.total, generator=torch.Generator().manual_seed(1)) < (0.6 if masked else 2)
    expected = loops(q, k, v, plan, rotary.inv_freq, mask)
    for result, reference in zip(
        attention_by_definition(q, k, v, plan, rotary, scale=0.7, mask=mask), expected, strict=True
    ):
        assert float(difference(result, reference).max()) < 1e-12
