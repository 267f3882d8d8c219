"""Measure one family with posenc applied: the identity plan, one remap against the dense judge, and detaching."""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

import posenc
from posenc.testing.judge import dense_logits
from posenc.testing.models import decoded, difference, model_outputs, relative_error
from scripts.tiny_families import tiny_model, tokens

PROMPT, STEPS, WINDOW_SIZE = 40, 5, 6
TOLERANCE = 1e-3
"""Relative to the largest logit; float32 models of a few layers against float64 attention."""


@dataclass
class Verdict:
    """The outcome for one family."""

    model_type: str
    model: str = ""
    verdict: str = "unbuilt"
    reason: str = ""
    attention: str = ""
    facts: list[str] = field(default_factory=list)
    identity: str = ""
    identity_bfloat16: str = ""
    remap_error: float | None = None
    remap_effect: float | None = None

    def data(self) -> dict[str, Any]:
        """Return the verdict as plain data."""
        return asdict(self)


def used(model: Any) -> dict[str, Tensor]:
    """Return the logits of every way to use a model."""
    return model_outputs(model, tokens(2, PROMPT + STEPS), PROMPT)


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference over all uses."""
    return max(difference(one[use], other[use]) for use in one)


def bfloat16_identity(model: Any) -> str:
    """Return how closely the identity plan equals the unpatched model in bfloat16, or why it does not run."""
    model = model.to(torch.bfloat16)
    try:
        stock = used(model)
    except Exception as error:
        return f"stock does not run ({type(error).__name__})"
    try:
        with posenc.apply(model, "rope", window=64):
            return _in_words(farthest(used(model), stock))
    except posenc.UnsupportedModelError as error:
        return f"refused: {error}"


def _in_words(difference: float) -> str:
    return "bit-equal" if difference == 0 else f"{difference:.2g}"


def measure(model_type: str) -> Verdict:
    """Build the family tiny and measure it under its default attention, or else under eager."""
    verdict = Verdict(model_type)
    for attention in (None, "eager"):
        try:
            model = tiny_model(model_type, attention)
        except Exception as error:
            verdict.reason = verdict.reason or f"{type(error).__name__}: {error}"
            return verdict
        verdict.model = type(model).__name__
        verdict.attention = model.config._attn_implementation
        try:
            _measure(model, verdict)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            verdict.verdict = "broken"
            verdict.reason = f"{type(error).__name__}: {error} ({place.name}:{place.lineno})"
        if verdict.verdict != "refused" or verdict.attention == "eager" or "eager" not in verdict.reason:
            return verdict
    return verdict


def _measure(model: Any, verdict: Verdict) -> None:
    try:
        with posenc.apply(model, "rope", window=64):
            pass
    except posenc.UnsupportedModelError as error:
        verdict.verdict, verdict.reason = "refused", str(error)
        if "does not run on a few tokens" in verdict.reason:  # nor does the unpatched model: the sizes do not fit
            verdict.verdict = "unbuilt"
        return
    stock = used(model)
    with posenc.apply(model, "rope", window=64) as handle:
        identity = farthest(used(model), stock)
        verdict.facts = handle.layers()
    detached = farthest(used(model), stock)
    ids = tokens(1, PROMPT + STEPS)
    rope = posenc.strategy("rope", window=64).plan(PROMPT, PROMPT + STEPS)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits[0]
    judge = relative_error(dense_logits(model, ids, rope.relative_positions()), plain)
    strategy = posenc.strategy("rerope", window=64, window_size=WINDOW_SIZE, replan="never")
    expected = dense_logits(model, ids, strategy.plan(PROMPT, PROMPT + STEPS).relative_positions())
    with torch.no_grad(), posenc.apply(model, strategy):
        got = decoded(model, ids, PROMPT)[0]
    verdict.identity = _in_words(identity)
    verdict.identity_bfloat16 = bfloat16_identity(model)
    verdict.remap_error = relative_error(got, expected)
    verdict.remap_effect = relative_error(got, plain)
    faults = []
    if identity > 1e-6:
        faults.append(f"identity differs by {identity:.2g}")
    if detached:
        faults.append(f"detached model differs by {detached:.2g}")
    if judge > TOLERANCE:
        faults.append(f"the dense judge itself differs from stock by {judge:.2g}")
    if not verdict.remap_error <= TOLERANCE:
        faults.append(f"remap differs from the dense judge by {verdict.remap_error:.2g}")
    if verdict.remap_effect < 10 * TOLERANCE:
        faults.append(f"the remap changes the logits by only {verdict.remap_effect:.2g}")
    verdict.verdict, verdict.reason = ("wrong", "; ".join(faults)) if faults else ("exact", "")
