"""The adapter seam: where a model family keeps its rotary module and how it rotates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posenc.errors import UnsupportedModelError
from posenc.rope import Rotary, Style

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""rope types whose module changes its frequencies inside ``forward``."""


@dataclass(frozen=True)
class ArchitectureAdapter:
    """Declared facts about a model family; ``apply`` checks them against the model itself.

    A family that keeps its parts elsewhere subclasses this and overrides the methods.

    Parameters
    ----------
    name : str
        Shown by ``posenc list --adapters``.
    summary : str
        One line on what it serves.
    model_types : tuple of str
        Values of ``config.model_type`` that this adapter serves.
    style : {"half", "interleaved"}
        Which channels its attention pairs up.
    """

    name: str
    summary: str
    model_types: tuple[str, ...]
    style: Style = "half"

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module whose forward computes positions and runs the layers."""
        decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
        return decoder

    def rotary_module(self, decoder: nn.Module) -> nn.Module:
        """The rotary module of the decoder.

        Raises
        ------
        UnsupportedModelError
            If the decoder has none, so the model does not use rotary positions.
        """
        rotary = getattr(decoder, "rotary_emb", None)
        if not isinstance(rotary, nn.Module) or not isinstance(getattr(rotary, "inv_freq", None), Tensor):
            raise UnsupportedModelError(
                f"{type(decoder).__name__} has no rotary module with inv_freq: only models with rotary position "
                "embeddings (RoPE) can be remapped."
            )
        return rotary

    def rotary(self, decoder: nn.Module, position_ids_BL: Tensor) -> Rotary:
        """Frequencies that the model itself uses for these positions (hooks must be off)."""
        module = self.rotary_module(decoder)
        if getattr(module, "rope_type", "default") in LENGTH_DEPENDENT:
            with torch.no_grad():
                module(torch.empty(0, device=position_ids_BL.device), position_ids_BL)
        inv_freq: Any = module.inv_freq
        scaling: Any = getattr(module, "attention_scaling", 1.0)
        return Rotary(inv_freq.detach().clone(), float(scaling), self.style, theta=self.theta(decoder))

    def theta(self, decoder: nn.Module) -> float | None:
        """Base of the model's geometric frequencies, from its configuration."""
        config: Any = decoder.config
        parameters = getattr(config, "rope_parameters", None) or {}
        theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
        return None if theta is None else float(theta)

    def window(self, model: nn.Module) -> int:
        """Pretraining window ``n`` in tokens."""
        config: Any = self.decoder(model).config
        parameters = getattr(config, "rope_parameters", None) or {}
        window = parameters.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        if not window:
            raise UnsupportedModelError(
                f"{type(config).__name__} declares no max_position_embeddings: pass window=... (in tokens)."
            )
        return int(window)
