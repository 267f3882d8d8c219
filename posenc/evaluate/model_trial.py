"""Whether the shipped model computes what it must with this transformers and torch: for ``posenc doctor``.

Shape letters: P prompt tokens, N new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from posenc.evaluate.models import TINY, load
from posenc.positions import IdentityStrategy

PROMPT = 200
NEW = 8
TOLERANCE = 1e-3
"""Largest difference of two logits that float32 explains; the model's lie between -20 and 20."""

REMAP: dict[str, Any] = {"window_size": 64}


class TrialRun(NamedTuple):
    """What a model makes of the prompt: its logits, and greedy generation with a cache."""

    logits_1PV: Tensor
    tokens: Tensor
    """The prompt and the new tokens, int64 [1, P + N]."""
    decoded_NV: Tensor


def failures() -> dict[str, str | None]:
    """What was checked on the shipped model, and why it is wrong; None where it is right.

    The keys are ``identity`` (bit-equal logits), ``generation`` (the same tokens), ``remap`` (other logits, none of
    them NaN), ``decoding`` (with a cache what the dense reference gives without one) and ``restored``.
    """
    from posenc.hf.apply import apply

    loaded = load(TINY)
    model = loaded.model
    with loaded.threads(), torch.no_grad():
        stock = _run(model)
        with apply(model, IdentityStrategy()):
            identity = _run(model)
        with apply(model, "rerope", **REMAP):
            remap = _run(model)
        with apply(model, "rerope", backend="reference", **REMAP):
            dense_NV = model(remap.tokens, use_cache=False).logits[0, PROMPT - 1 : -1]
        after = _run(model)
    off = float((identity.logits_1PV - stock.logits_1PV).abs().max())
    apart = float((remap.decoded_NV - dense_NV).abs().max())
    right = {
        "identity": torch.equal(identity.logits_1PV, stock.logits_1PV),
        "generation": torch.equal(identity.tokens, stock.tokens),
        "remap": bool(remap.logits_1PV.isfinite().all()) and not torch.equal(remap.logits_1PV, stock.logits_1PV),
        "decoding": apart <= TOLERANCE,  # False for NaN as well
        "restored": all(map(torch.equal, after, stock)),
    }
    reasons = {
        "identity": f"the identity plan changes the shipped model by {off:.1e}",
        "generation": "under the identity plan the shipped model generates other tokens",
        "remap": "a remap does not change the shipped model, or makes it NaN",
        "decoding": f"a remap decodes with a cache what is off by {apart:.1e} from the dense reference without one",
        "restored": "the shipped model is not restored after a remap",
    }
    return {name: None if right[name] else reason for name, reason in reasons.items()}


def _run(model: Any) -> TrialRun:
    prompt_1P = torch.arange(PROMPT)[None] % model.config.vocab_size
    out = model.generate(
        prompt_1P,
        attention_mask=torch.ones_like(prompt_1P),
        do_sample=False,
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return TrialRun(model(prompt_1P).logits, out.sequences, torch.cat(out.logits))
