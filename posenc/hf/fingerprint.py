"""What tells one model from another: the facts that decide which positions it can read, and some of its weights.

A calibration file carries one, so that numbers measured on one model are not used on another.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from posenc.files import plain
from posenc.params import Fingerprint

if TYPE_CHECKING:
    from torch import nn

    from posenc.adapter import ArchitectureAdapter

SAMPLED = 16
"""Values hashed of every parameter tensor."""


def fingerprint(model: nn.Module, adapter: ArchitectureAdapter) -> Fingerprint:
    """Take the fingerprint of a transformers model; reads a few numbers of every tensor."""
    decoder = adapter.decoder(model)
    config: Any = decoder.config
    sizes = {
        "hidden_size": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "key_value_heads": "num_key_value_heads",
        "vocabulary": "vocab_size",
    }
    return Fingerprint(
        model_type=config.model_type,
        window=adapter.window(model),
        **{ours: getattr(config, theirs, None) for ours, theirs in sizes.items()},
        rope=plain(getattr(config, "rope_parameters", None) or {}),
        weights=_hash_weights(decoder),
    )


def _hash_weights(decoder: nn.Module) -> str:
    import torch

    digest = hashlib.sha256()
    for parameter in decoder.parameters():
        digest.update(str(tuple(parameter.shape)).encode())
        if parameter.is_floating_point() and not parameter.is_meta:
            first = parameter.detach().flatten()[:SAMPLED].to(torch.bfloat16)
            digest.update(first.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
