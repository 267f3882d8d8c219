"""What tells one model from another: the facts that decide which positions it can read, and some of its weights.

A calibration file carries one, so that numbers measured on one model are not used on another.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, PositiveInt

if TYPE_CHECKING:
    from torch import nn

    from posenc.adapter import ArchitectureAdapter

SAMPLED = 16
"""Values hashed of every parameter tensor."""


class Fingerprint(BaseModel):
    """Architecture, window, rotary parameters and a hash of weights.

    Parameters
    ----------
    model_type : str
        Family, as transformers names it.
    window : int
        Pretraining window in tokens.
    hidden_size, layers, heads, key_value_heads, vocabulary : int, optional
        Sizes, where the configuration declares them.
    rope : dict
        ``rope_parameters`` of the configuration.
    weights : str
        Hash of the first values of every tensor of the decoder, rounded to bfloat16: loading the same
        checkpoint in another dtype does not change it, training does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_type: str
    window: PositiveInt
    hidden_size: PositiveInt | None = None
    layers: PositiveInt | None = None
    heads: PositiveInt | None = None
    key_value_heads: PositiveInt | None = None
    vocabulary: PositiveInt | None = None
    rope: dict[str, Any] = {}
    weights: str

    def differences(self, other: Fingerprint) -> list[str]:
        """``"layers: 3 and 30"`` for every fact that is not the same, this model's value first."""
        mine, theirs = self.model_dump(), other.model_dump()
        return [f"{key}: {mine[key]} and {theirs[key]}" for key in mine if mine[key] != theirs[key]]

    def __str__(self) -> str:
        return f"{self.model_type}, {self.layers} layers, hidden size {self.hidden_size}, window {self.window}"


def fingerprint(model: nn.Module, adapter: ArchitectureAdapter) -> Fingerprint:
    """Take the fingerprint of a transformers model; reads a few numbers of every tensor."""
    from posenc.files import plain

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
