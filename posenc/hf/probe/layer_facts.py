"""Measure one attention layer: which channels are rotated, how, by which frequencies, and what its mask hides.

The probe runs the same tokens under four rotations (:data:`CASES`) and records the queries and keys that reach each
layer's attention function (``posenc/hf/probe/probe.py``). :func:`layer_facts` reads one such call.

Shape letters: R rows (cases x tokens), H heads, L tokens of a row, D head_dim; X stands for any further axes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posenc.adapter import LayerFacts, RotarySource
from posenc.errors import UnsupportedModelError
from posenc.hf.layer_call import LayerCall
from posenc.hf.probe.masks import NotedMask, measured_window
from posenc.rope import Arithmetic, Rotary, Style

CASES = ("none", "quarter", "double", "model")
"""Rotations of a row: none, a quarter turn of every pair, none with doubled cosines, and the model's own."""

TOKENS = 3
POSITION = 29
"""Rotary position of every row; small, so that no module changes its frequencies for it."""

STYLES: tuple[Style, ...] = ("half", "interleaved")

Kinds = dict[RotarySource, tuple[Rotary, tuple[Arithmetic, ...]]]
"""Frequencies that may feed a layer, the likeliest first, and how the model may round with them."""


def by_case(x_RX: Tensor) -> Tensor:
    """Return the rows as [cases, tokens, ...]."""
    return x_RX.reshape(len(CASES), TOKENS, *x_RX.shape[1:])


def alike(x_RX: Tensor) -> bool:
    """Return whether all cases gave the same values, within rounding."""
    cases = by_case(x_RX)
    return _error(cases, cases[:1].expand_as(cases)) < _tolerance(x_RX)


def _tolerance(x: Tensor) -> float:
    """Return the allowed relative difference: products of different rows of a batch may round differently."""
    return 1e-3 if x.dtype in (torch.float32, torch.float64) else 3e-2


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    scale = float(expected.abs().max()) or 1.0
    return float((actual.float() - expected.float()).abs().max()) / scale


def layer_facts(call: LayerCall, kinds: Kinds, masks: list[NotedMask], where: str) -> LayerFacts:
    """Read from one call of the attention function what its layer rotates and sees.

    Parameters
    ----------
    call : LayerCall
        The recorded call, whose rows are tokens under every case.
    kinds : Kinds
        Frequencies that may feed the layer.
    masks : list of NotedMask
        The masks that were made in the forward.
    where : str
        Name of the layer, for messages.

    Raises
    ------
    UnsupportedModelError
        If the layer cannot be computed from raw queries and keys and a plan.
    """
    sliding_window = measured_window(call.mask, masks, call.options.get("sliding_window"), where)
    widths = {2 * len(base.inv_freq) for base, _ in kinds.values()}
    layouts_q, layouts_k = (_layouts(x, widths, where) for x in (call.q_BHLD, call.k_BHKD))
    if layouts_q is None and layouts_k is None:
        return LayerFacts(None, sliding_window=sliding_window)
    if layouts_q is None or layouts_k is None:
        raise UnsupportedModelError(f"{where}: only its {'keys' if layouts_q is None else 'queries'} are rotated.")
    fits = [
        (facts, _rotation_error(call, facts.of(base)))
        for channels, style in layouts_q
        if (channels, style) in layouts_k
        for source, (base, arithmetics) in kinds.items()
        if 2 * len(base.inv_freq) == channels[1] - channels[0]
        for facts in (LayerFacts(source, style, channels, sliding_window, arithmetic) for arithmetic in arithmetics)
    ]
    if not fits:
        raise UnsupportedModelError(f"{where}: queries and keys are rotated differently ({layouts_q}, {layouts_k}).")
    best, error = min(fits, key=lambda fit: fit[1])
    if error > _tolerance(call.q_BHLD):
        raise UnsupportedModelError(
            f"{where}: the model's rotation at position {POSITION} differs by {error:.2g} from that of every rotary "
            f"module ({', '.join(f'{s.prefix}{s.module}' for s in kinds)})."
        )
    return best


def _layouts(x_RHLD: Tensor, widths: set[int], where: str) -> list[tuple[tuple[int, int], Style]] | None:
    """Return the channels and styles that explain the quarter turn, or None if nothing rotates."""
    none, quarter, double, model = by_case(x_RHLD).unbind(0)
    tolerance = _tolerance(x_RHLD)
    smallest = tolerance * (float(none.abs().max()) or 1.0)
    moved_D = torch.stack([(x - none).abs() > smallest for x in (quarter, double, model)]).flatten(0, 3).any(0)
    if not bool(moved_D.any()):
        return None
    moved, dim = moved_D.nonzero().flatten(), x_RHLD.shape[-1]
    first, last = int(moved[0]), int(moved[-1])
    linear, layouts = False, []
    for width in widths:
        for start in dict.fromkeys((0, dim - width, first)):
            if not 0 <= start <= first or not last < start + width <= dim:
                continue
            part = slice(start, start + width)
            if _error(double[..., part], 2 * none[..., part]) > tolerance:
                continue
            linear = True
            layouts += [
                ((start, start + width), style)
                for style in STYLES
                if _error(quarter[..., part], _quarter_turn(none[..., part], style)) < tolerance
            ]
    if layouts:
        return layouts
    if not linear:
        raise UnsupportedModelError(
            f"{where}: doubled cosines do not double the rotated queries and keys (channels {first}..{last}), so "
            "something between the rotation and the attention is not linear (a norm after the rotation): raw keys in "
            "the cache cannot stand for rotated ones."
        )
    raise UnsupportedModelError(
        f"{where}: a quarter turn pairs channels {first}..{last} neither as halves nor interleaved: something after "
        "the rotation changes the queries and keys (a norm, a weight per channel), or its rotation is of another kind."
    )


def _quarter_turn(x: Tensor, style: Style) -> Tensor:
    if style == "half":
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def _rotation_error(call: LayerCall, rotary: Rotary) -> float:
    """Return the largest relative difference between the model's own rotation and posenc's rotation of raw tensors."""
    worst = 0.0
    for x_RHLD in (call.q_BHLD, call.k_BHKD):
        cases = by_case(x_RHLD)
        position = torch.full((TOKENS, 1), POSITION, device=x_RHLD.device)
        worst = max(worst, _error(cases[3], rotary.rotate_as_stock(cases[0], position)))
    return worst
