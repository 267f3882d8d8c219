"""Check that the shipped model computes what it should with this transformers and torch, for ``posenc doctor``.

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
"""Largest difference of two logits that float32 explains; the model's logits lie between -20 and 20."""

REMAP: dict[str, Any] = {"window_size": 64}


class TrialRun(NamedTuple):
    """The logits of a model on the prompt, and greedy generation with a cache."""

    logits_1PV: Tensor
    tokens: Tensor
    """The prompt and the new tokens, int64 [1, P + N]."""
    decoded_NV: Tensor


def failures() -> dict[str, str | None]:
    """Run the checks on the shipped model; per check the reason why it fails, or None.

    The checks are ``identity`` (bit-equal logits), ``generation`` (the same tokens), ``remap`` (other logits, none of
    them NaN), ``decoding`` (the same with a cache as the dense reference without one) and ``restored``.
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
    identity_error = float((identity.logits_1PV - stock.logits_1PV).abs().max())
    decoding_error = float((remap.decoded_NV - dense_NV).abs().max())
    passed = {
        "identity": torch.equal(identity.logits_1PV, stock.logits_1PV),
        "generation": torch.equal(identity.tokens, stock.tokens),
        "remap": bool(remap.logits_1PV.isfinite().all()) and not torch.equal(remap.logits_1PV, stock.logits_1PV),
        "decoding": decoding_error <= TOLERANCE,  # False for NaN as well
        "restored": all(map(torch.equal, after, stock)),
    }
    reasons = {
        "identity": f"the identity plan changes the shipped model by {identity_error:.1e}",
        "generation": "under the identity plan the shipped model generates other tokens",
        "remap": "a remap does not change the shipped model, or makes it NaN",
        "decoding": f"under a remap, decoding with a cache is off by {decoding_error:.1e} from the dense reference",
        "restored": "the shipped model is not restored after a remap",
    }
    return {name: None if passed[name] else reason for name, reason in reasons.items()}


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
