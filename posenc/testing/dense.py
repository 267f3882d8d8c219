"""Plans written out pair by pair, independent of the plan's own methods; all checks use these.

Shape letters: L total tokens, F rotary frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from posenc.plan import PositionPlan
from posenc.segment import Segment
from posenc.testing.violation import violated

Dense = NDArray[np.float64]


@dataclass(frozen=True)
class DensePlan:
    """Segment, relative distance and scale of every pair of a plan.

    Parameters
    ----------
    owner : int [L, L]
        Index of the segment that attends the pair, -1 where none does.
    relative : float64 [L, L, F]
        ``q[i] - k[j]``, NaN where the pair is not attended; ``F`` is 1 unless positions differ per frequency.
    scale : float64 [L]
        Factor on the logits of each query, ones where the plan has none.
    mixed : bool [L, L]
        The pair's logit is interpolated between whole positions, of which at least one is not its own.
    """

    owner: NDArray[np.int64]
    relative: Dense
    scale: Dense
    mixed: NDArray[np.bool_]

    @classmethod
    def of(cls, plan: PositionPlan, where: str = "") -> DensePlan:
        """Write a plan out; a pair in two segments or a key in the future is a violation."""
        total = plan.total
        for segment in plan.segments:
            _check_segment(segment, total, where)
        widths = {a.shape[1] for s in plan.segments for a in (s.query_positions, s.key_positions) if a.ndim == 2} - {1}
        if len(widths) > 1:
            violated(f"{where}positions have {sorted(widths)} columns: one number of frequencies per plan.")
        owner = np.full((total, total), -1, dtype=np.int64)
        relative = np.full((total, total, *(widths or {1})), np.nan)
        mixed = np.zeros((total, total), dtype=bool)
        key = np.arange(total)
        for number, segment in enumerate(plan.segments):
            inside = (key >= segment.key_start[:, None]) & (key < segment.key_stop[:, None])
            if (twice := first_pair(inside & (owner >= 0))) is not None:
                names = [plan.segments[int(owner[twice])].name, segment.name]
                violated(f"{where}pair {shown(twice)} is attended by segments {names[0]!r} and {names[1]!r}.")
            if (ahead := first_pair(inside & (key > key[:, None]))) is not None:
                violated(
                    f"{where}pair {shown(ahead)} lies in the future, and segment {segment.name!r} attends it: "
                    "key_stop must be at most i + 1."
                )
            owner[inside] = number
            row, column = inside.nonzero()
            query, keys = _columns(segment.query_positions), _columns(segment.key_positions)
            relative[row, column] = query[row] - keys[column]
            if segment.interpolation == "logits":
                mixed[row, column] = (query % 1 != 0).any(1)[row] | (keys % 1 != 0).any(1)[column]
        return cls(owner, relative, _scale(plan, where), mixed)

    @property
    def farthest(self) -> Dense:
        """Largest relative distance of each query, float64 [L]; -inf where it attends nothing."""
        values: Dense = np.where(np.isnan(self.relative), -np.inf, self.relative).max(axis=(1, 2))
        return values


def mixture(plan: PositionPlan) -> list[tuple[Dense, Dense]]:
    """Weights and relative positions, each [L, L, F]: a logit is the weighted sum of those at these positions.

    The first has weight one everywhere unless a segment interpolates logits.
    """
    dense = DensePlan.of(plan)
    parts = [(np.zeros_like(dense.relative), np.zeros_like(dense.relative)) for _ in range(4)]
    for number, segment in enumerate(plan.segments):
        row, column = (dense.owner == number).nonzero()
        sides = product(_neighbours(segment, segment.query_positions), _neighbours(segment, segment.key_positions))
        for (weight, relative), ((q_share, q), (k_share, k)) in zip(parts, sides, strict=False):
            weight[row, column], relative[row, column] = q_share[row] * k_share[column], q[row] - k[column]
    return [(weight, relative) for weight, relative in parts if weight.any()]


def _neighbours(segment: Segment, positions: Dense) -> list[tuple[Dense, Dense]]:
    """Weights and positions, each [L, F], that are mixed on one side (query or key) of a segment."""
    exact = _columns(positions).astype(np.float64)
    if segment.interpolation == "positions":
        return [(np.ones_like(exact), exact)]
    share = exact - np.floor(exact)
    return [(1 - share, np.floor(exact)), (share, np.floor(exact) + 1)]


def first_pair(where: NDArray[np.bool_]) -> tuple[int, int] | None:
    """The first ``(i, j)`` of a bool [L, L] that is True."""
    if not where.any():
        return None
    i, j = np.unravel_index(int(where.argmax()), where.shape)
    return int(i), int(j)


def shown(pair: tuple[int, int]) -> str:
    """A pair, written for messages."""
    return f"(i={pair[0]}, j={pair[1]})"


def _columns(positions: Dense) -> Dense:
    return positions if positions.ndim == 2 else positions[:, None]


def _check_segment(segment: Segment, total: int, where: str) -> None:
    label = f"{where}segment {segment.name!r}: "
    for key in ("key_start", "key_stop"):
        bound = getattr(segment, key)
        if bound.shape != (total,) or bound.dtype != np.int64:
            violated(f"{label}{key} must be int64 [{total}], got {bound.dtype} {list(bound.shape)}.")
        if (bound < 0).any() and key == "key_start":
            violated(f"{label}key_start is negative at query {int((bound < 0).argmax())}.")
        if (np.diff(bound) < 0).any():
            i = int((np.diff(bound) < 0).argmax())
            violated(
                f"{label}{key} decreases from {bound[i]} at query {i} to {bound[i + 1]} at query {i + 1}: "
                "both bounds must be non-decreasing."
            )
    for key in ("query_positions", "key_positions"):
        positions = getattr(segment, key)
        if positions.ndim not in (1, 2) or len(positions) != total:
            violated(f"{label}{key} must be [{total}] or [{total}, F], got {list(positions.shape)}.")
        bad = ~np.isfinite(positions)
        if bad.any():
            at = int(bad.reshape(total, -1).any(axis=1).argmax())
            violated(
                f"{label}{key} is {positions.reshape(total, -1)[at][bad.reshape(total, -1)[at]][0]} at token {at}."
            )


def _scale(plan: PositionPlan, where: str) -> Dense:
    if plan.query_scale is None:
        return np.ones(plan.total)
    scale = np.asarray(plan.query_scale)
    if scale.shape != (plan.total,):
        violated(f"{where}query_scale must be float [{plan.total}], got shape {list(scale.shape)}.")
    if not (np.isfinite(scale) & (scale > 0)).all():
        i = int((~(np.isfinite(scale) & (scale > 0))).argmax())
        violated(f"{where}query_scale is {scale[i]} at query {i}: it must be positive and finite.")
    return scale.astype(np.float64)
