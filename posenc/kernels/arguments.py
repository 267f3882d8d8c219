"""Check the arguments of :func:`posenc.attention` before anything broadcasts them or fails deep inside a kernel.

Every check raises :class:`~posenc.errors.InvalidInputError`, and its message names the argument and shows its value.

Shape letters: B batch, H heads, L tokens, D head_dim, F rotary frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from posenc.backend import needs_gradient
from posenc.errors import InvalidInputError
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.plan import PositionPlan
from posenc.rope import Rotary


def checked_plans(plan: Any, rows: int) -> list[PositionPlan]:
    """The plans of a batch: one for all rows, or one for each."""
    if isinstance(plan, PositionPlan):
        return [plan]
    plans = list(plan) if isinstance(plan, Sequence) else [plan]
    for given in plans:
        if not isinstance(given, PositionPlan):
            raise InvalidInputError(
                f"plan must be a PositionPlan or a list of one per batch row, not {_named(given)}: "
                "make one with posenc.strategy(...).plan(prompt, total)."
            )
    if len(plans) != rows:
        raise InvalidInputError(f"got {len(plans)} plans for {rows} batch rows: give one plan, or one per row.")
    return plans


def check_lengths(plans: Sequence[PositionPlan], k: Tensor) -> None:
    """Every plan covers as many tokens as there are keys."""
    for plan in plans:
        if plan.total != k.shape[2]:
            raise InvalidInputError(
                f"the plan covers {plan.total} tokens but there are {k.shape[2]} keys: build it with "
                f"strategy.plan(prompt, total={k.shape[2]})."
            )


def check_rotary(rotary: Any, plans: Sequence[PositionPlan], q: Tensor) -> None:
    """The rotary has finite frequencies, and fits the width of the heads and the positions of the plans."""
    if not isinstance(rotary, Rotary):
        raise InvalidInputError(
            f"rotary must be a Rotary, not {_named(rotary)}: make one with posenc.Rotary.from_theta(theta, head_dim) "
            "or from the model's own frequencies, posenc.Rotary(inv_freq)."
        )
    if rotary.inv_freq.device.type == "meta" and q.device.type != "meta":
        raise InvalidInputError(
            "rotary.inv_freq is on the device 'meta', where it holds no numbers: load the model's weights first."
        )
    if needs_gradient(rotary.inv_freq):
        raise InvalidInputError(
            "rotary.inv_freq requires a gradient, and attention computes none for it: pass inv_freq.detach()."
        )
    rotary.check_values()
    rotary.check_width(q.shape[-1])
    for segment in {id(segment): segment for plan in plans for segment in plan.segments}.values():
        for positions in (segment.query_positions, segment.key_positions):
            rotary.check_positions(positions.shape)


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """The value is a finite number, or None where the default holds."""
    if value is None:
        return
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or (positive and not value > 0):
        kind = "a finite number above 0" if positive else "a finite number"
        raise InvalidInputError(f"{name} must be {kind} or None, got {_named(value)}.")


def check_choice(backend: Any, kept: Any) -> None:
    """``backend`` is a name, and ``kept`` a cache of rotated keys or None."""
    if not isinstance(backend, str):
        raise InvalidInputError(f"backend must be a name from posenc.backends() or 'auto', not {_named(backend)}.")
    if kept is not None and not isinstance(kept, RotatedKeyCache):
        raise InvalidInputError(
            f"kept must be a RotatedKeyCache or None, not {_named(kept)}: make one with "
            "posenc.kernels.rotated_key_cache.RotatedKeyCache()."
        )


def check_sinks(sinks: Any, q: Tensor) -> None:
    """Sinks are one logit per query head, or None."""
    if sinks is None:
        return
    heads = q.shape[1]
    if not isinstance(sinks, Tensor) or not sinks.is_floating_point() or tuple(sinks.shape) != (heads,):
        raise InvalidInputError(
            f"sinks must be a floating tensor with one logit per query head, [{heads}], got {_named(sinks)}."
        )
    _check_device("sinks", sinks, q)


def check_tensors(q: Any, k: Any, v: Any, mask: Any) -> None:
    """Query, key, value and mask fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise InvalidInputError(f"{name} must be a torch tensor [batch, heads, tokens, head_dim], not {_named(x)}.")
    if not q.ndim == k.ndim == v.ndim == 4:
        raise InvalidInputError(f"q, k and v must be [batch, heads, tokens, head_dim], got {_shapes(q, k, v)}.")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3] and q.shape[3] == k.shape[3]):
        raise InvalidInputError(f"batch, key/value heads, key/value tokens or head_dim differ: {_shapes(q, k, v)}.")
    if not k.shape[1] or not q.shape[1] or q.shape[1] % k.shape[1]:
        raise InvalidInputError(f"query heads must be a multiple of key/value heads: {_shapes(q, k, v)}.")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise InvalidInputError(f"there must be 1 <= Lq <= Lk tokens: {_shapes(q, k, v)}.")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise InvalidInputError(f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}.")
    if not q.device == k.device == v.device:
        raise InvalidInputError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}.")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise InvalidInputError(f"mask must be a bool tensor (True = attend), got {_named(mask)}.")
        expected = (q.shape[0], 1, q.shape[2], k.shape[2])
        if tuple(mask.shape) != expected:
            raise InvalidInputError(f"mask must be [B, 1, Lq, Lk] = {expected}, got {tuple(mask.shape)}.")
        _check_device("mask", mask, q)


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise InvalidInputError(f"{name} must be on the device of q, {q.device}, and is on {x.device}: move it there.")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"


def _named(value: Any) -> str:
    """A value as a message shows it, in at most some 60 characters."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
