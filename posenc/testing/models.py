"""Outputs of a model in prefill, padded batches and decoding, and differences between two outputs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from posenc.hf.transformers_names import cache_argument, output_cache


def tokens(vocabulary: int, *shape: int, seed: int = 1) -> Tensor:
    """Random token ids, int64, never 0 (often the padding token)."""
    return torch.randint(1, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def decoded(model: Any, ids: Tensor, prompt: int, mask: Tensor | None = None) -> Tensor:
    """Logits of a prefill of ``prompt`` tokens and of the tokens decoded one by one after it."""
    cache, parts = None, []
    positions = torch.arange(ids.shape[1])[None] if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    cuts = [0, *range(prompt, ids.shape[1] + 1)]
    for low, high in pairwise(cuts):
        out = model(
            ids[:, low:high],
            attention_mask=None if mask is None else mask[:, :high],
            position_ids=positions[:, low:high],  # as generate passes them; without them some families count from 0
            **cache_argument(model, cache),
            use_cache=True,
        )
        cache = output_cache(out)
        parts.append(out.logits)
    return torch.cat(parts, 1)


def left_padded(ids: Tensor, padding: int) -> Tensor:
    """An attention mask whose first row begins with padding."""
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return mask


def model_outputs(model: Any, ids: Tensor, prompt: int, padding: int = 7) -> dict[str, Tensor]:
    """Logits of prefill, of a left-padded batch, and of decoding, both with and without padding."""
    mask = left_padded(ids, padding)
    with torch.no_grad():
        return {
            "prefill": model(ids, use_cache=False).logits,
            "prefill of a left-padded batch": model(ids, attention_mask=mask, use_cache=False).logits[:, padding:],
            "decoding": decoded(model, ids, prompt),
            "decoding of a left-padded batch": decoded(model, ids, prompt, mask)[:, padding:],
        }


def difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; 0 means bit-equal, and a NaN counts as infinite."""
    if torch.equal(one, other):
        return 0.0
    return float((one - other).abs().nan_to_num(float("inf")).max())


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute expected value."""
    return float((got - expected).abs().max() / expected.abs().max())
