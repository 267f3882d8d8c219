"""Compute a model's fingerprint from its sizes, its rotary parameters and some of its weights.

A calibration file stores the fingerprint, so that numbers measured on one model are not used on another.
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
"""How many values of every parameter tensor are hashed."""


def fingerprint(model: nn.Module, adapter: ArchitectureAdapter) -> Fingerprint:
    """Compute the fingerprint of a transformers model; this reads a few numbers of every tensor."""
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
        **{field: getattr(config, attribute, None) for field, attribute in sizes.items()},
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
