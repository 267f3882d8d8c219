"""Attention of a few rows over all keys, in float64, straight from a plan: the expected rows of long outputs.

The contract's definition (:mod:`posenc.testing.definition`) computes every pair, which is feasible up to a few thousand
tokens. Here only the sampled queries attend to all keys, one key/value head at a time, so that 128k tokens take a
second on a GPU. Rotation is a product of complex numbers and shares nothing with any backend, ``Rotary.rotate`` or its
tables.

Random queries would hide mistakes: over 128k keys a softmax is so flat that one extra key changes its output by a
thousandth of what rounding to bfloat16 does. So every sampled query is *aimed* at one key: it is that key, rotated so
that their logit at a segment's positions outweighs all other keys together. A query that is aimed at the keys on both
sides of a segment's border shows a key that is missing, counted twice, from the future, or seen one position off.

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
"""Rows that are always sampled at the beginning, and at the end."""

EXCESS = 2.0
"""By how much the logit of a key that a query is aimed at exceeds the logarithm of the number of keys."""

BROAD_EVERY = 8
"""One head in this many is not aimed: its softmax covers all keys, so a range of keys that is skipped shows there."""


def sampled_rows(plan: PositionPlan, q_len: int, count: int, seed: int) -> IntArray:
    """Sample at most ``count`` of the last ``q_len`` rows: the first, the last, rows around borders, and random rows.

    A border is a row at which a bound of a segment starts or stops moving.
    """
    first, total = plan.total - q_len, plan.total
    if q_len <= count:
        return np.arange(first, total)
    random = np.random.default_rng(seed)
    rows: set[int] = {*range(first, first + ENDS), *range(total - ENDS, total)}
    borders = np.unique(np.concatenate([_borders(segment) for segment in plan.segments]))
    borders = random.permutation(borders[borders > first])[: count // 5]
    rows.update(int(row) for border in borders for row in (border - 1, border, border + 1) if first <= row < total)
    while len(rows) < count:
        rows.add(int(random.integers(first, total)))
    return np.array(sorted(rows))


def _borders(segment: Segment) -> IntArray:
    """Rows at which the step of a bound changes."""
    bounds = np.stack((segment.key_start, segment.key_stop))
    return np.flatnonzero((np.diff(bounds, 2) != 0).any(0)).astype(np.int64) + 1


@dataclass(frozen=True)
class Aim:
    """The query of one row and head, aimed at one key at the positions of one segment."""

    row: int
    head: int
    segment: Segment
    key: int


def aim_queries(
    q_BHLD: Tensor, k_BGLD: Tensor, plan: PositionPlan, rotary: Rotary, rows: IntArray, scale: float, seed: int
) -> None:
    """Replace the queries of some rows, in place, by queries that are aimed at keys.

    The heads of a row are aimed, one after another, at the keys on both sides of every border of its segments, and then
    at random keys of its segments. A key outside a segment is aimed at with that segment's positions: if a backend
    attends to it there, it outweighs all other keys. One head in ``BROAD_EVERY`` keeps its random query.
    """
    first, count = plan.total - q_BHLD.shape[2], q_BHLD.shape[1]
    aims = _aims(plan, rows, count, seed)
    row_A, head_A, key_A = torch.tensor([(aim.row, aim.head, aim.key) for aim in aims], device=q_BHLD.device).unbind(1)
    q_positions = np.stack([np.atleast_1d(aim.segment.query_positions[aim.row]) for aim in aims]).astype(np.float64)
    k_positions = np.stack([np.atleast_1d(aim.segment.key_positions[aim.key]) for aim in aims]).astype(np.float64)
    k_AD = k_BGLD[0, head_A // (count // k_BGLD.shape[1]), key_A].double()
    q_AD = _rotated(k_AD, k_positions - q_positions, rotary)
    factor_A: Tensor | float = scale
    if plan.query_scale is not None:
        factor_A = scale * torch.from_numpy(plan.query_scale).to(k_AD.device)[row_A]
    logit_A = factor_A * (_rotated(q_AD, q_positions, rotary) * _rotated(k_AD, k_positions, rotary)).sum(-1)
    q_AD *= ((math.log(plan.total) + EXCESS) / logit_A)[:, None]
    q_BHLD[0, head_A, row_A - first] = q_AD.to(q_BHLD.dtype)


def _aims(plan: PositionPlan, rows: IntArray, head_count: int, seed: int) -> list[Aim]:
    """An aim for every sampled row and every head that is aimed."""
    random = np.random.default_rng(seed)
    heads = [head for head in range(head_count) if head % BROAD_EVERY != BROAD_EVERY - 1]
    aims = []
    for row in map(int, rows):
        border_keys = _border_keys(plan, row, random)
        for index, head in enumerate(heads):
            target = border_keys[index] if index < len(border_keys) else _random_key(plan, row, random)
            aims.append(Aim(row, head, *target))
    return aims


def _border_keys(plan: PositionPlan, row: int, random: np.random.Generator) -> list[tuple[Segment, int]]:
    """Keys on both sides of the borders of a row's segments, in random order."""
    keys = []
    for segment in plan.segments:
        start, stop = int(segment.key_start[row]), int(segment.key_stop[row])
        if start < stop:
            neighbours = dict.fromkeys((start - 1, start, stop - 1, stop))
            keys += [(segment, key) for key in neighbours if 0 <= key < plan.total]
    return [keys[index] for index in random.permutation(len(keys))]


def _random_key(plan: PositionPlan, row: int, random: np.random.Generator) -> tuple[Segment, int]:
    """A random key of a random segment of a row."""
    segments = [segment for segment in plan.segments if segment.key_start[row] < segment.key_stop[row]]
    segment = segments[int(random.integers(len(segments)))]
    return segment, int(random.integers(segment.key_start[row], segment.key_stop[row]))


def expected_rows(
    q_BHLD: Tensor, k_BGLD: Tensor, v_BGLD: Tensor, plan: PositionPlan, rotary: Rotary, rows: IntArray, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute output [H, R, D] and natural-log logsumexp [H, R] of the first batch row in float64.

    Both are on the device of the tensors.
    """
    device, group = q_BHLD.device, q_BHLD.shape[1] // k_BGLD.shape[1]
    index_R = torch.from_numpy(rows - (plan.total - q_BHLD.shape[2])).to(device)
    factor_R1: Tensor | float = scale
    if plan.query_scale is not None:
        factor_R1 = scale * torch.from_numpy(plan.query_scale[rows]).to(device)[:, None]
    index_L = torch.arange(plan.total, device=device)
    outs, lses = [], []
    for head in range(k_BGLD.shape[1]):
        q_HRD = q_BHLD[0, head * group : (head + 1) * group, index_R].double()
        k_LD = k_BGLD[0, head].double()
        logits_HRL = torch.full((group, len(rows), plan.total), -math.inf, dtype=torch.float64, device=device)
        for segment in plan.segments:
            start, stop = (torch.from_numpy(x[rows]).to(device)[:, None] for x in (segment.key_start, segment.key_stop))
            rotated_k_LD = _rotated(k_LD, segment.key_positions, rotary)
            rotated_q_HRD = _rotated(q_HRD, segment.query_positions[rows], rotary)
            attended_RL = (index_L >= start) & (index_L < stop)
            logits_HRL = torch.where(attended_RL, rotated_q_HRD @ rotated_k_LD.T * factor_R1, logits_HRL)
        lse_HR = logits_HRL.logsumexp(-1)
        outs.append((logits_HRL - lse_HR[..., None]).exp() @ v_BGLD[0, head].double())
        lses.append(lse_HR)
    return torch.cat(outs), torch.cat(lses)


def _rotated(x_LD: Tensor, positions: Positions, rotary: Rotary) -> Tensor:
    """Channels [..., L, D] in float64, each pair rotated as a complex number by its frequency times the position."""
    first = rotary.rotated[0]
    count = len(rotary.inv_freq)
    position_LF: NDArray[np.float64] = np.asarray(positions, dtype=np.float64).reshape(len(positions), -1)
    angle_LF = torch.from_numpy(position_LF).to(x_LD.device) * rotary.inv_freq.double().to(x_LD.device)
    step, apart = (1, count) if rotary.style == "half" else (2, 1)
    channel_F = torch.arange(first, first + count * step, step, device=x_LD.device)
    pairs = torch.complex(x_LD[..., channel_F], x_LD[..., channel_F + apart])
    pairs = pairs * torch.polar(torch.full_like(angle_LF, rotary.attention_scaling), angle_LF)
    out_LD = x_LD.clone()
    out_LD[..., channel_F], out_LD[..., channel_F + apart] = pairs.real, pairs.imag
    return out_LD


@dataclass(frozen=True)
class RowErrors:
    """The largest differences over the sampled rows; NaN, in memory that was not written, counts as infinite.

    Parameters
    ----------
    output : float
        Of an output channel, divided by the root mean square of the expected output of its row and head.
    lse : float
        Of a logsumexp.
    row, head : int
        Where the output differs most.
    rows : int
        Rows that were compared.
    """

    output: float
    lse: float
    row: int
    head: int
    rows: int


def compare_rows(
    result: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rows: IntArray, first: int
) -> RowErrors:
    """Compare output [1, H, Lq, D] and logsumexp [1, H, Lq] of a backend with the expected rows.

    ``first`` is the row of the plan that the first query of the backend's output belongs to.
    """
    index_R = torch.from_numpy(rows - first).to(result[0].device)
    out_HRD, lse_HR = result[0][0][:, index_R].double(), result[1][0][:, index_R].double()
    size_HR1 = expected[0].square().mean(-1, keepdim=True).sqrt()
    error_HRD = ((out_HRD - expected[0]).abs() / size_HR1).nan_to_num(nan=math.inf)
    error_HR = error_HRD.amax(-1)
    lse_error_HR = (lse_HR - expected[1]).abs().nan_to_num(nan=math.inf)
    head, row = divmod(int(error_HR.argmax()), len(rows))
    return RowErrors(float(error_HR.max()), float(lse_error_HR.max()), int(rows[row]), head, len(rows))
