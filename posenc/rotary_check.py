"""What ``strategy.rotary`` may return: other frequencies in the layout of the model's own."""

from __future__ import annotations

import math
from typing import Any

import torch

from posenc.rope import Rotary


def same_frequencies(one: Rotary, other: Rotary) -> bool:
    """True when two rotaries rotate alike, to the last bit."""
    return one.attention_scaling == other.attention_scaling and torch.equal(one.inv_freq, other.inv_freq)


def fault_of(found: Any, base: Rotary, *, changes: bool) -> str | None:
    """What is wrong with the frequencies that a strategy made of ``base``, or None.

    Parameters
    ----------
    found : Rotary
        What ``rotary(base, prompt)`` returned.
    base : Rotary
        The model's own.
    changes : bool
        Whether the strategy declares that it changes frequencies.
    """
    if not isinstance(found, Rotary):
        return f"returns {found!r:.100}, not a Rotary."
    layouts = [(one.style, one.rotated, one.arithmetic, len(one.inv_freq)) for one in (found, base)]
    if layouts[0] != layouts[1]:
        return "changes the layout of the rotation: use base.with_frequencies(...)."
    finite = found.inv_freq.is_floating_point() and bool(found.inv_freq.isfinite().all())
    if not (finite and 0 < found.attention_scaling < math.inf):
        return "has a frequency or an attention_scaling that is not finite and positive."
    if not changes and not same_frequencies(found, base):
        return "returns other frequencies, but Capabilities(changes_frequencies=True) is not declared."
    return None
