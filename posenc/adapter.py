"""The adapter seam: where a model family keeps its decoder and rotary modules, and what one layer rotates."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from posenc.checkpoint import window_of
from posenc.errors import UnsupportedModelError
from posenc.rope import Arithmetic, Rotary, Style

LENGTH_DEPENDENT = ("dynamic", "longrope")
"""rope types whose module changes its frequencies inside ``forward``."""

EVERY_FAMILY = "*"
"""In ``model_types``: whatever no other adapter names, where the probe finds that it fits."""


@dataclass(frozen=True)
class RotarySource:
    """One set of frequencies: a rotary module of the decoder, and the layer type it was asked for.

    Parameters
    ----------
    module : str
        Name of the module inside the decoder.
    layer_type : str, optional
        Where one module holds several sets (Gemma 3, OLMo 3), which one.
    """

    module: str
    layer_type: str | None = None

    @property
    def prefix(self) -> str:
        """Of the module's attributes that belong to this set."""
        return "" if self.layer_type is None else f"{self.layer_type}_"


@dataclass(frozen=True)
class LayerFacts:
    """What the probe measured on one attention layer.

    Parameters
    ----------
    source : RotarySource or None
        The frequencies that feed it; None for a layer without rotary positions (NoPE).
    style : {"half", "interleaved"}
        Which channels are paired up.
    channels : (int, int), optional
        Half-open range of rotated head channels.
    sliding_window : int, optional
        Its own sliding window.
    arithmetic : {"native", "mixed", "float32", "complex"}
        How the model rounds when it rotates (see :class:`~posenc.rope.Rotary`).
    """

    source: RotarySource | None
    style: Style = "half"
    channels: tuple[int, int] | None = None
    sliding_window: int | None = None
    arithmetic: Arithmetic = "native"

    def describe(self) -> str:
        """In words."""
        window = "" if self.sliding_window is None else f", window {self.sliding_window}"
        if self.source is None:
            return f"no rotary positions{window}"
        channels = "" if self.channels is None else f" {self.channels[0]}..{self.channels[1] - 1}"
        kind = "" if self.source.layer_type is None else f", frequencies of {self.source.layer_type}"
        return f"{self.style}, channels{channels}{kind}{window}"

    def of(self, base: Rotary) -> Rotary:
        """The source's frequencies in this layer's layout."""
        return replace(base, style=self.style, channels=self.channels, arithmetic=self.arithmetic)


@dataclass(frozen=True)
class ArchitectureAdapter:
    """Where a family keeps its parts, and what it declares about them; ``apply`` measures the rest.

    A family that keeps its parts elsewhere subclasses this and overrides the methods.

    Parameters
    ----------
    name : str
        Shown by ``posenc list --adapters``.
    summary : str
        One line on what it serves.
    model_types : tuple of str
        Values of ``config.model_type`` that this adapter serves; ``"*"`` for every one that no
        other adapter names.
    style : {"half", "interleaved"}, optional
        Which channels its attention pairs up; a probe that finds otherwise refuses the model.
    tolerance : float
        Largest difference that the identity self-test may show. 0 means bit-equal.
    """

    name: str
    summary: str
    model_types: tuple[str, ...]
    style: Style | None = None
    tolerance: float = 0.0

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module whose forward computes positions and runs the layers."""
        decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
        if not hasattr(decoder, "config"):  # a head that happens to be called "decoder"
            decoder = getattr(model, "base_model", model)
        assert isinstance(decoder, nn.Module)
        return decoder

    def rotary_modules(self, decoder: nn.Module) -> dict[str, nn.Module]:
        """The rotary modules of a decoder by name.

        Raises
        ------
        UnsupportedModelError
            If it has none, so the model does not use rotary positions.
        """
        found = {name: module for name, module in decoder.named_modules() if _frequencies(module)}
        if not found:
            model_type = getattr(getattr(decoder, "config", None), "model_type", "?")
            raise UnsupportedModelError(
                f"{type(decoder).__name__} ({model_type!r}) has no rotary module with inv_freq: only models with "
                "rotary position embeddings (RoPE) in a module of their own can be remapped."
            )
        return found

    def rotary(self, decoder: nn.Module, source: RotarySource, position_ids_BL: Tensor) -> Rotary:
        """Frequencies that the model itself uses for these positions, whatever it ran before.

        Read afresh in every forward, from any thread: it must not change the module.

        Raises
        ------
        UnsupportedModelError
            If the module's tables are not made of the frequencies it declares, or are offloaded.
        """
        module = decoder.get_submodule(source.module)
        if rope_type(module, source) in LENGTH_DEPENDENT:
            module = _fresh(module, source)
            which = {} if source.layer_type is None else {"layer_type": source.layer_type}
            with torch.no_grad():
                x = torch.empty(0, device=position_ids_BL.device)
                table = type(module).forward(module, x, position_ids_BL, **which)  # past every hook
            _check_scaling(module, table, float(getattr(module, f"{source.prefix}attention_scaling", 1.0)))
        inv_freq: Any = getattr(module, f"{source.prefix}inv_freq")
        if inv_freq.is_meta:
            raise UnsupportedModelError(
                f"the frequencies of {type(module).__name__} are offloaded. Offload parameters only "
                "(offload_buffers=False)."
            )
        scaling: Any = getattr(module, f"{source.prefix}attention_scaling", 1.0)
        kind = rope_type(module, source)
        with torch.inference_mode(False):  # they serve later forwards, which may train
            own = inv_freq.detach().clone()
            return Rotary(own, float(scaling), theta=self.theta(decoder, source), scaling=kind)

    def theta(self, decoder: nn.Module, source: RotarySource) -> float | None:
        """Base of the model's geometric frequencies, from its configuration."""
        config: Any = decoder.config
        parameters = getattr(config, "rope_parameters", None) or {}
        if source.layer_type is not None:
            parameters = parameters.get(source.layer_type) or parameters
        theta = parameters.get("rope_theta", getattr(config, "rope_theta", None))
        return None if theta is None else float(theta)

    def window(self, model: nn.Module) -> int:
        """Pretraining window ``n`` in tokens, see :func:`posenc.window_of`."""
        decoder: Any = self.decoder(model)
        return window_of(decoder.config)


def rope_type(module: nn.Module, source: RotarySource) -> str:
    """The kind of frequencies a rotary module computes for a source."""
    kind: Any = getattr(module, "rope_type", "default")
    return str(kind.get(source.layer_type, "default") if isinstance(kind, dict) else kind)


def _fresh(module: nn.Module, source: RotarySource) -> nn.Module:
    """A copy of a rotary module with the frequencies it was made with: the model's own remembers its last forward."""
    fresh = copy.copy(module)
    fresh._buffers = {name: None if x is None else x.clone() for name, x in module._buffers.items()}
    original: Any = getattr(module, f"{source.prefix}original_inv_freq", None)
    if original is not None:
        fresh._buffers[f"{source.prefix}inv_freq"] = original.clone()
    for name in (f"{source.prefix}max_seq_len_cached", "max_seq_len_cached"):
        if hasattr(fresh, name):
            setattr(fresh, name, getattr(fresh, "original_max_seq_len", getattr(fresh, name)))
    return fresh


def _frequencies(module: nn.Module) -> list[str]:
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return [name for name in names if name.endswith("inv_freq") and not name.endswith("original_inv_freq")]


def _check_scaling(module: nn.Module, table: Any, declared: float) -> None:
    """Some modules scale by another factor beyond the original window without saying so (Phi-3.5-MoE)."""
    cos, sin = (table.real, table.imag) if isinstance(table, Tensor) else table
    scaling = float(torch.hypot(cos[0, -1].float(), sin[0, -1].float()).mean())
    if abs(scaling - declared) > 1e-3 * declared:
        raise UnsupportedModelError(
            f"{type(module).__name__} scales its tables by {scaling:.4g} at this length, and declares "
            f"attention_scaling={declared:.4g}: posenc cannot follow its frequencies."
        )
