"""The judge of the backends, held to plain Python loops over pairs."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posenc.plan import PositionPlan
from posenc.rope import Rotary
from posenc.testing import attention_by_definition, random_plans
from posenc.testing.tensors import difference, tensors


def loops(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: PositionPlan, inv_freq: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over loops of pairs; half style, scale 0.7."""
    batch, heads, q_len, dim = q.shape
    total, groups, half = plan.total, heads // k.shape[1], dim // 2
    relative = plan.relative_positions()
    out = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, q_len), -math.inf, dtype=torch.float64)
    for b, h, row in np.ndindex(batch, heads, q_len):
        i = total - q_len + row
        logits = {}
        for j in range(i + 1):
            if np.isnan(relative[i, j]).any() or not mask[b, 0, row, j]:
                continue
            query, key = q[b, h, row].double(), k[b, h // groups, j].double()
            turn = [float(inv_freq[c]) * float(np.broadcast_to(relative[i, j], half)[c]) for c in range(half)]
            dot = sum(
                (float(query[c] * key[c] + query[c + half] * key[c + half])) * math.cos(turn[c])
                + (float(query[c] * key[c + half] - query[c + half] * key[c])) * math.sin(turn[c])
                for c in range(half)
            )
            logits[j] = dot * 0.7 * (1.0 if plan.query_scale is None else float(plan.query_scale[i]))
        if logits:
            values = torch.tensor(list(logits.values()), dtype=torch.float64)
            lse[b, h, row] = values.logsumexp(0)
            out[b, h, row] = values.softmax(0) @ v[b, h // groups, list(logits)].double()
    return out, lse


@settings(max_examples=25)
@given(random_plans(max_total=14, frequencies=2), st.integers(0, 13), st.booleans())
def test_the_definition_is_what_loops_compute(plan: PositionPlan, cut: int, masked: bool) -> None:
    q_len = max(1, plan.total - cut)
    q, k, v = tensors(plan, q_len, (4, 2), 4, batch=1)
    rotary = Rotary.from_theta(50.0, 4)
    mask = torch.rand(1, 1, q_len, plan.total, generator=torch.Generator().manual_seed(1)) < (0.6 if masked else 2)
    expected = loops(q, k, v, plan, rotary.inv_freq, mask)
    for found, wanted in zip(
        attention_by_definition(q, k, v, plan, rotary, scale=0.7, mask=mask), expected, strict=True
    ):
        assert float(difference(found, wanted).max()) < 1e-12
