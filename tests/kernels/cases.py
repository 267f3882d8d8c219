"""Random plans of every shape, and attention from the definition, for the kernel tests."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from hypothesis import strategies as st

from posenc.plan import Lengths, PositionPlan, Segment


@st.composite
def plans(draw: st.DrawFn, max_total: int = 70) -> PositionPlan:
    """A partition of the causal plane by random non-decreasing cuts: bands, staircases and jumps."""
    total = draw(st.integers(1, max_total))
    lengths = Lengths(draw(st.integers(1, total)), total)
    index = lengths.indices
    cuts = [np.zeros(total, dtype=np.int64)]
    for _ in range(draw(st.integers(0, 3))):
        shape = draw(st.sampled_from(["band", "chunk", "steps", "empty", "full"]))
        width = draw(st.integers(1, total))
        cut = {
            "band": np.maximum(index + 1 - width, 0),
            "chunk": index // width * width,
            "steps": np.maximum.accumulate((index * draw(st.integers(0, 7)) // 3) % (width + 1)),
            "empty": np.zeros_like(index),
            "full": index + 1,
        }[shape]
        cuts.append(np.minimum(cut, index + 1))
    bounds = [*np.sort(np.stack(cuts), axis=0), index + 1]
    maps = {
        "identity": index,
        "shifted": index + 5,
        "grouped": index // 3,
        "zero": index * 0,
        "leaky": index / 7,
    }
    segments = [
        Segment(
            f"s{number}",
            low,
            high,
            maps[draw(st.sampled_from(sorted(maps)))],
            maps[draw(st.sampled_from(sorted(maps)))],
        )
        for number, (low, high) in enumerate(pairwise(bounds))
    ]
    scale = 1 + 0.2 * np.sin(index) if draw(st.booleans()) else None
    return PositionPlan.build(lengths, segments, query_scale=scale)


def by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: PositionPlan,
    inv_freq: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over plain Python loops of pairs, straight from the definition; half style, one row at a time."""
    batch, heads, q_len, dim = q.shape
    total, groups, half = plan.total, heads // k.shape[1], dim // 2
    relative = plan.relative_positions()
    out = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, q_len), -math.inf, dtype=torch.float64)
    theta = [float(f) for f in inv_freq]
    for b in range(batch):
        for h in range(heads):
            for row in range(q_len):
                i = total - q_len + row
                logits = {}
                for j in range(i + 1):
                    if np.isnan(relative[i, j]).any() or (mask is not None and not mask[b, 0, row, j]):
                        continue
                    query, key = q[b, h, row].double(), k[b, h // groups, j].double()
                    turn = [theta[c] * float(relative[i, j]) for c in range(half)]
                    dot = sum(
                        (float(query[c] * key[c] + query[c + half] * key[c + half])) * math.cos(turn[c])
                        + (float(query[c] * key[c + half] - query[c + half] * key[c])) * math.sin(turn[c])
                        for c in range(half)
                    )
                    logits[j] = dot * scale * (1.0 if plan.query_scale is None else float(plan.query_scale[i]))
                if logits:
                    values = torch.tensor(list(logits.values()), dtype=torch.float64)
                    lse[b, h, row] = values.logsumexp(0)
                    out[b, h, row] = values.softmax(0) @ v[b, h // groups, list(logits)].double()
    return out, lse
