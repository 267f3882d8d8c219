"""Attention of a few rows against all keys, in float64, straight from a plan: what long outputs are held against.

The contract's judge (:mod:`posenc.testing.definition`) writes out every pair, which ends at a few thousand
tokens. Here only the sampled queries meet all the keys, one key/value head at a time, so that 128k tokens take
a second on a GPU. Rotation is the product of complex numbers: nothing is shared with any backend, nor with
``Rotary.rotate`` and its tables.

Random queries would hide mistakes: over 128k keys a softmax is so flat that one key too many changes its output
by a thousandth of what bfloat16 does. So every sampled query is *aimed* at one key: it is that key, turned
so that their logit in a segment's positions outweighs all other keys together. Aimed at the keys on both sides of a
segment's border it shows a key that is missing, doubled, leaked from the future, or seen one position off.

Shape letters: R sampled rows, A aimed queries, H query heads, G key/value heads, L tokens, D head_dim,
F rotary frequencies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posenc.plan import PositionPlan
from posenc.rope import Rotary
from posenc.segment import IntArray, Positions, Segment

ENDS = 4
"""Rows that are always sampled at the beginning and at the end."""

EXCESS = 2.0
"""How far the logit of a key that is aimed at lies above the logarithm of the number of keys."""

BROAD_EVERY = 8
"""One in so many heads is not aimed: its softmax spreads over all keys, and a part that is skipped shows there."""


def sampled_rows(plan: PositionPlan, q_len: int, count: int, seed: int) -> IntArray:
    """At most ``count`` of the last ``q_len`` rows: the first, the last, those around borders, the rest at random.

    A border is a row at which some bound of a segment stops or starts to move.
    """
    first, total = plan.total - q_len, plan.total
    if q_len <= count:
        return np.arange(first, total)
    random = np.random.default_rng(seed)
    found: set[int] = {*range(first, first + ENDS), *range(total - ENDS, total)}
    turns = np.unique(np.concatenate([_turns(segment) for segment in plan.segments]))
    turns = random.permutation(turns[turns > first])[: count // 5]
    found.update(int(row) for turn in turns for row in (turn - 1, turn, turn + 1) if first <= row < total)
    while len(found) < count:
        found.add(int(random.integers(first, total)))
    return np.array(sorted(found))


def _turns(segment: Segment) -> IntArray:
    """Rows where a bound's step changes."""
    bounds = np.stack((segment.key_start, segment.key_stop))
    return np.flatnonzero((np.diff(bounds, 2) != 0).any(0)).astype(np.int64) + 1


def aimed_queries(
    q_BHLD: Tensor, k_BGLD: Tensor, plan: PositionPlan, rotary: Rotary, rows: IntArray, scale: float, seed: int
) -> None:
    """Replace the queries of some rows, in place, by ones that are aimed at keys.

    The heads of a row are aimed in turn at the keys on both sides of every border of its segments (a key
    outside of a segment at its position inside of it: were it attended there, it would outweigh the rest), and then
    at random keys of the segments. One head in ``BROAD_EVERY`` keeps its random query.
    """
    random = np.random.default_rng(seed)
    first, count = plan.total - q_BHLD.shape[2], q_BHLD.shape[1]
    aimed = [head for head in range(count) if head % BROAD_EVERY != BROAD_EVERY - 1]
    aims: list[tuple[int, int, Segment, int]] = []
    for row in map(int, rows):
        places = _places(plan, row, random)
        for turn, head in enumerate(aimed):
            aims.append((row, head, *(places[turn] if turn < len(places) else _inside(plan, row, random))))
    row_A, head_A, key_A = (torch.tensor([aim[n] for aim in aims], device=q_BHLD.device) for n in (0, 1, 3))
    places_q, places_k = (
        np.stack([np.atleast_1d(aim[2].query_positions[aim[0]]) for aim in aims]).astype(np.float64),
        np.stack([np.atleast_1d(aim[2].key_positions[aim[3]]) for aim in aims]).astype(np.float64),
    )
    k_AD = k_BGLD[0, head_A // (count // k_BGLD.shape[1]), key_A].double()
    q_AD = _turned(k_AD, places_k - places_q, rotary)
    factor_A: Tensor | float = scale
    if plan.query_scale is not None:
        factor_A = scale * torch.from_numpy(plan.query_scale).to(k_AD.device)[row_A]
    logit_A = factor_A * (_turned(q_AD, places_q, rotary) * _turned(k_AD, places_k, rotary)).sum(-1)
    q_AD *= ((math.log(plan.total) + EXCESS) / logit_A)[:, None]
    q_BHLD[0, head_A, row_A - first] = q_AD.to(q_BHLD.dtype)


def _places(plan: PositionPlan, row: int, random: np.random.Generator) -> list[tuple[Segment, int]]:
    """Keys on both sides of the borders of a row's segments, in random order."""
    found = []
    for segment in plan.segments:
        start, stop = int(segment.key_start[row]), int(segment.key_stop[row])
        if start < stop:
            beside = dict.fromkeys((start - 1, start, stop - 1, stop))
            found += [(segment, key) for key in beside if 0 <= key < plan.total]
    return [found[n] for n in random.permutation(len(found))]


def _inside(plan: PositionPlan, row: int, random: np.random.Generator) -> tuple[Segment, int]:
    """Any key of any segment of a row."""
    own = [s for s in plan.segments if s.key_start[row] < s.key_stop[row]]
    segment = own[int(random.integers(len(own)))]
    return segment, int(random.integers(segment.key_start[row], segment.key_stop[row]))


def expected_rows(
    q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, plan: PositionPlan, rotary: Rotary, rows: IntArray, scale: float
) -> tuple[Tensor, Tensor]:
    """Output [H, R, D] and natural-log logsumexp [H, R] of the first batch row, float64, on the tensors' device."""
    device, group = q_BHLD.device, q_BHLD.shape[1] // k_BGLD.shape[1]
    own = rows - (plan.total - q_BHLD.shape[2])
    at = torch.from_numpy(own).to(device)
    factor_R1: Tensor | float = scale
    if plan.query_scale is not None:
        factor_R1 = scale * torch.from_numpy(plan.query_scale[rows]).to(device)[:, None]
    index_L = torch.arange(plan.total, device=device)
    outs, lses = [], []
    for head in range(k_BGLD.shape[1]):
        q_HRD = q_BHLD[0, head * group : (head + 1) * group, at].double()
        k_LD = k_BGLD[0, head].double()
        logits_HRL = torch.full((group, len(rows), plan.total), -math.inf, dtype=torch.float64, device=device)
        for segment in plan.segments:
            start, stop = (torch.from_numpy(x[rows]).to(device)[:, None] for x in (segment.key_start, segment.key_stop))
            turned_LD = _turned(k_LD, segment.key_positions, rotary)
            turned_HRD = _turned(q_HRD, segment.query_positions[rows], rotary)
            seen_RL = (index_L >= start) & (index_L < stop)
            logits_HRL = torch.where(seen_RL, turned_HRD @ turned_LD.T * factor_R1, logits_HRL)
        lse_HR = logits_HRL.logsumexp(-1)
        outs.append((logits_HRL - lse_HR[..., None]).exp() @ v_BGLD[0, head].double())
        lses.append(lse_HR)
    return torch.cat(outs), torch.cat(lses)


def _turned(x_LD: Tensor, positions: Positions, rotary: Rotary) -> Tensor:
    """Channels [..., L, D] in float64, each pair a complex number turned by its frequency times the position."""
    first = rotary.rotated[0]
    count = len(rotary.inv_freq)
    place_LF: NDArray[np.float64] = np.asarray(positions, dtype=np.float64).reshape(len(positions), -1)
    angle_LF = torch.from_numpy(place_LF).to(x_LD.device) * rotary.inv_freq.double().to(x_LD.device)
    step, apart = (1, count) if rotary.style == "half" else (2, 1)
    one = torch.arange(first, first + count * step, step, device=x_LD.device)
    turned = torch.complex(x_LD[..., one], x_LD[..., one + apart])
    turned = turned * torch.polar(torch.full_like(angle_LF, rotary.attention_scaling), angle_LF)
    out_LD = x_LD.clone()
    out_LD[..., one], out_LD[..., one + apart] = turned.real, turned.imag
    return out_LD


@dataclass(frozen=True)
class Errors:
    """The largest differences over the sampled rows; NaN where something was not written counts as infinite.

    Parameters
    ----------
    output : float
        Of an output's channel, over the root mean square of the expected output of its row and head.
    lse : float
        Of a logsumexp.
    row, head : int
        Where the output is farthest off.
    """

    output: float
    lse: float
    row: int
    head: int


def errors(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rows: IntArray, first: int) -> Errors:
    """Hold outputs [1, H, Lq, D] and logsumexp [1, H, Lq] against the expected ones; row ``first`` is theirs."""
    at = torch.from_numpy(rows - first).to(found[0].device)
    out_HRD, lse_HR = found[0][0][:, at].double(), found[1][0][:, at].double()
    size_HR1 = expected[0].square().mean(-1, keepdim=True).sqrt()
    off_HRD = ((out_HRD - expected[0]).abs() / size_HR1).nan_to_num(nan=math.inf)
    off_HR = off_HRD.amax(-1)
    lse = (lse_HR - expected[1]).abs().nan_to_num(nan=math.inf)
    head, row = divmod(int(off_HR.argmax()), len(rows))
    return Errors(float(off_HR.max()), float(lse.max()), int(rows[row]), head)
