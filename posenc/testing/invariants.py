"""The invariants of a plan; each function raises ContractViolation with the first pair or query that breaks one."""

from __future__ import annotations

import numpy as np

from posenc.errors import InvalidInputError
from posenc.plan import PositionPlan
from posenc.testing.dense import Dense, DensePlan, first_pair, shown
from posenc.testing.violation import violated

ROUNDING = 1e-9
"""Tolerance for the rounding of fractional positions; whole positions never come close to it."""


def check_partition(plan: PositionPlan, where: str, *, drops_keys: bool) -> None:
    """Every pair ``j <= i`` lies in exactly one segment, or in at most one where keys may be dropped."""
    dense = DensePlan.of(plan, where)
    if drops_keys:
        alone = np.diag(dense.owner) < 0
        if alone.any():
            violated(f"{where}query {int(alone.argmax())} does not attend itself; only earlier keys may be dropped.")
    else:
        missed = first_pair((dense.owner < 0) & np.tri(plan.total, dtype=bool))
        if missed is not None:
            violated(
                f"{where}pair {shown(missed)} is attended by no segment. "
                "A strategy that means to drop keys declares Capabilities(drops_keys=True)."
            )
    try:
        plan.check(drops_keys=drops_keys)
    except InvalidInputError as error:
        violated(f"{where}{error}")


def check_order(plan: PositionPlan, where: str, *, monotone: bool) -> None:
    """No relative distance is negative; with ``monotone``, a farther key is never seen nearer."""
    relative = DensePlan.of(plan, where).relative
    negative = first_pair(np.asarray((relative < -ROUNDING).any(axis=2)))
    if negative is not None:
        violated(f"{where}pair {shown(negative)} is seen at relative distance {_value(relative, negative)}, below 0.")
    if not monotone:
        return
    for i, row in enumerate(relative):
        keys = np.flatnonzero(~np.isnan(row[:, 0]))[::-1]
        steps = np.diff(row[keys], axis=0).min(axis=1, initial=np.inf)
        if (steps < -ROUNDING).any():
            at = int((steps < -ROUNDING).argmax())
            near, far = (i, int(keys[at])), (i, int(keys[at + 1]))
            violated(
                f"{where}pair {shown(near)} is seen at {_value(relative, near)} and the farther pair {shown(far)} at "
                f"{_value(relative, far)}. A strategy that means this declares Capabilities(monotone=False)."
            )


def check_range(plan: PositionPlan, where: str) -> None:
    """``max_relative``, ``reach`` and ``relative_positions()`` agree with the segments."""
    dense = DensePlan.of(plan, where)
    relative = plan.relative_positions()
    if not np.array_equal(_broadcast(relative, dense.relative), dense.relative, equal_nan=True):
        violated(f"{where}relative_positions() is not q[i] - k[j] of the segments.")
    farthest = dense.farthest
    if plan.max_relative != farthest.max():
        i = int(farthest.argmax())
        violated(
            f"{where}max_relative reports {plan.max_relative:g}, "
            f"but query {i} sees a key at relative distance {farthest[i]:g}."
        )
    if not np.array_equal(plan.reach, np.maximum.accumulate(farthest)):
        i = int((plan.reach != np.maximum.accumulate(farthest)).argmax())
        violated(f"{where}reach[{i}] is {plan.reach[i]:g}, the segments say {farthest[: i + 1].max():g}.")


def check_bounded(plan: PositionPlan, where: str, *, window: int) -> None:
    """All distances of a ``bounded`` strategy's plan are inside the window."""
    if plan.max_relative >= window:
        i = int((plan.reach >= window).argmax())
        violated(
            f"{where}query {i} sees a key at relative distance {plan.reach[i]:g}, beyond the window of {window} "
            "tokens, although Capabilities(bounded=True) is declared."
        )


def check_retention(plan: PositionPlan, where: str, *, first: int, last: int) -> None:
    """From query ``first + last`` on, only the kept keys are attended, at the same distances as by that query."""
    dense = DensePlan.of(plan, where)
    full = first + last
    for i in range(full, plan.total):
        dropped = dense.owner[i, first : i - last + 1] >= 0
        if dropped.any():
            pair = (i, first + int(dropped.argmax()))
            violated(f"{where}pair {shown(pair)} is attended, but retention(first={first}, last={last}) drops it.")
        for keys, counterparts in (
            (range(first), range(first)),
            (range(i - last + 1, i + 1), range(full - last + 1, full + 1)),
        ):
            for j, other in zip(keys, counterparts, strict=True):
                pair, before = (i, j), (full, other)
                if not np.array_equal(dense.relative[pair], dense.relative[before], equal_nan=True):
                    violated(
                        f"{where}pair {shown(pair)} is {_seen(dense.relative, pair)}, and pair {shown(before)} "
                        f"{_seen(dense.relative, before)}: with retention, later queries see the kept keys as query "
                        f"first + last = {full} does."
                    )
        if dense.scale[i] != dense.scale[full]:
            violated(
                f"{where}query_scale is {dense.scale[i]:g} at query {i} and {dense.scale[full]:g} at query {full}: "
                "with retention it stays the same from query first + last on."
            )


def check_same(one: PositionPlan, other: PositionPlan, where: str, *, what: str, names: tuple[str, str]) -> None:
    """The first ``other.total`` queries of ``one`` are seen exactly as in ``other``.

    Parameters
    ----------
    what : str
        Beginning of the message, such as ``"decoding differs from prefill"``.
    names : (str, str)
        What the message calls the two plans.
    """
    total = other.total
    left, right = DensePlan.of(one, where), DensePlan.of(other, where)
    a, b = np.broadcast_arrays(left.relative[:total, :total], right.relative)
    differs = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    pair = first_pair(differs.any(axis=2))
    if pair is not None:
        violated(
            f"{where}{what} at query {pair[0]}: pair {shown(pair)} is {_seen(a, pair)} {names[0]} "
            f"and {_seen(b, pair)} {names[1]}."
        )
    pair = first_pair(left.mixed[:total, :total] != right.mixed)
    if pair is not None:
        there, here = names if left.mixed[pair] else reversed(names)
        violated(
            f"{where}{what} at query {pair[0]}: the logit of pair {shown(pair)} is interpolated {there}, not {here}."
        )
    scaled = left.scale[:total] != right.scale
    if scaled.any():
        i = int(scaled.argmax())
        violated(
            f"{where}{what} at query {i}: query_scale is {left.scale[i]:g} {names[0]} "
            f"and {right.scale[i]:g} {names[1]}."
        )


def check_prefill_equals_decode(full: PositionPlan, step: PositionPlan, where: str) -> None:
    """The plan of ``step.total`` tokens is the beginning of a plan of more tokens with the same prompt."""
    names = (f"in the plan of {full.total} tokens", f"in the plan of {step.total}")
    check_same(full, step, where, what="decoding differs from prefill", names=names)
    cut = full.prefix(step.total)
    if cut.is_identity != step.is_identity:
        violated(
            f"{where}decoding differs from prefill: is_identity is {cut.is_identity} for the first {step.total} tokens "
            f"{names[0]} and {step.is_identity} {names[1]}."
        )
    if len(cut.segments) != len(step.segments):
        prefill, decode = ([segment.name for segment in plan.segments] for plan in (cut, step))
        violated(
            f"{where}decoding differs from prefill: the same pairs are held by the segments {prefill} {names[0]} "
            f"and {decode} {names[1]}."
        )


def check_identity(plan: PositionPlan, where: str, *, because: str) -> None:
    """One segment ``[0, i + 1)`` with ``q = i`` and ``k = j``, and no scale: bit-equal to the unpatched model."""
    index = np.arange(plan.total)
    dense = DensePlan.of(plan, where)
    moved = first_pair(
        (dense.relative != (index[:, None] - index)[..., None]).any(axis=2) & np.tri(len(index), dtype=bool)
    )
    if moved is not None:
        violated(f"{where}{because}, but pair {shown(moved)} is {_seen(dense.relative, moved)} (identity invariant).")
    check_unscaled(plan, where, because=because)
    if len(plan.segments) != 1:
        names = ", ".join(repr(segment.name) for segment in plan.segments)
        violated(f"{where}{because}, but there are {len(plan.segments)} segments ({names}): the identity plan has one.")
    (segment,) = plan.segments
    parts = {
        "key_start": (segment.key_start, index * 0),
        "key_stop": (segment.key_stop, index + 1),
        "query_positions": (segment.query_positions, index),
        "key_positions": (segment.key_positions, index),
    }
    for key, (actual, expected) in parts.items():
        if not np.array_equal(actual, expected):
            violated(f"{where}{because}, but {key} of segment {segment.name!r} is not that of plain RoPE.")
    if not plan.is_identity:
        violated(f"{where}{because}, but is_identity is False.")


def check_unscaled(plan: PositionPlan, where: str, *, because: str) -> None:
    """A plan that changes no distance has no ``query_scale``."""
    if plan.query_scale is not None:
        scale = DensePlan.of(plan, where).scale
        i = int((scale != 1).argmax())
        violated(
            f"{where}{because}, but query_scale is {scale[i]:g} at query {i} (identity invariant): "
            "a plan that moves nothing scales nothing."
        )


def keeps_every_distance(plan: PositionPlan, where: str) -> bool:
    """True when every pair ``j <= i`` is attended at its true distance."""
    index = np.arange(plan.total)
    causal = np.tri(plan.total, dtype=bool)
    true = (index[:, None] - index)[causal, None]
    dense = DensePlan.of(plan, where)
    return bool((dense.relative[causal] == true).all()) and not dense.mixed.any()


def _broadcast(relative: Dense, like: Dense) -> Dense:
    return np.broadcast_to(relative if relative.ndim == 3 else relative[..., None], like.shape)


def _value(relative: Dense, pair: tuple[int, int]) -> str:
    values = relative[pair]
    return f"{values[0]:g}" if len(values) == 1 else f"[{', '.join(f'{v:g}' for v in values)}]"


def _seen(relative: Dense, pair: tuple[int, int]) -> str:
    return "not attended" if np.isnan(relative[pair]).any() else f"seen at {_value(relative, pair)}"
