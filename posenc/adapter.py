"""The adapter seam: where a model family keeps its decoder and its rotary modules, and how one layer rotates."""

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
"""Rope types whose module changes its frequencies inside ``forward``."""

EVERY_FAMILY = "*"
"""In ``model_types``: every model type that no other adapter names; the probe decides whether a model is served."""


@dataclass(frozen=True)
class RotarySource:
    """One set of frequencies: a rotary module of the decoder, and one of its layer types.

    Parameters
    ----------
    module : str
        Name of the module inside the decoder.
    layer_type : str, optional
        Which set, if the module holds several (Gemma 3, OLMo 3).
    """

    module: str
    layer_type: str | None = None

    @property
    def prefix(self) -> str:
        """Prefix of the module's attributes that belong to this set."""
        return "" if self.layer_type is None else f"{self.layer_type}_"


@dataclass(frozen=True)
class LayerFacts:
    """What the probe measured on one attention layer.

    Parameters
    ----------
    source : RotarySource or None
        The frequencies that it rotates with; None for a layer without rotary positions (NoPE).
    style : {"half", "interleaved"}
        Which channels form pairs.
    channels : (int, int), optional
        Half-open range of rotated head channels.
    sliding_window : int, optional
        The layer's sliding window, in tokens.
    arithmetic : {"native", "mixed", "float32", "complex"}
        How the model rounds when it rotates (see :class:`~posenc.rope.Rotary`).
    """

    source: RotarySource | None
    style: Style = "half"
    channels: tuple[int, int] | None = None
    sliding_window: int | None = None
    arithmetic: Arithmetic = "native"

    def describe(self) -> str:
        """The facts as one line of text."""
        window = "" if self.sliding_window is None else f", window {self.sliding_window}"
        if self.source is None:
            return f"no rotary positions{window}"
        channels = "" if self.channels is None else f" {self.channels[0]}..{self.channels[1] - 1}"
        kind = "" if self.source.layer_type is None else f", frequencies of {self.source.layer_type}"
        return f"{self.style}, channels{channels}{kind}{window}"

    def of(self, base: Rotary) -> Rotary:
        """The frequencies ``base`` of the source, in this layer's layout."""
        return replace(base, style=self.style, channels=self.channels, arithmetic=self.arithmetic)


@dataclass(frozen=True)
class ArchitectureAdapter:
    """Where a family keeps its decoder and rotary modules; ``apply`` measures how its layers rotate.

    For a family that keeps them elsewhere, subclass this and override the methods.

    Parameters
    ----------
    name : str
        Shown by ``posenc list --adapters``.
    summary : str
        One line on which models it serves.
    model_types : tuple of str
        Values of ``config.model_type`` that this adapter serves; ``"*"`` for every one that no
        other adapter names.
    style : {"half", "interleaved"}, optional
        Which channels the family's attention pairs; if the probe measures another style, the model is refused.
    tolerance : float
        Largest difference from the unpatched model that the self-test of the identity allows; 0 means bit-equal.
    """

    name: str
    summary: str
    model_types: tuple[str, ...]
    style: Style | None = None
    tolerance: float = 0.0

    def decoder(self, model: nn.Module) -> nn.Module:
        """The module whose forward computes the positions and runs the layers."""
        decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
        if not hasattr(decoder, "config"):  # an output head that is called "decoder"
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
        modules = {name: module for name, module in decoder.named_modules() if _frequencies(module)}
        if not modules:
            model_type = getattr(getattr(decoder, "config", None), "model_type", "?")
            raise UnsupportedModelError(
                f"{type(decoder).__name__} ({model_type!r}) has no rotary module with inv_freq: only models with "
                "rotary position embeddings (RoPE) in a module of their own can be remapped."
            )
        return modules

    def rotary(self, decoder: nn.Module, source: RotarySource, position_ids_BL: Tensor) -> Rotary:
        """Frequencies that the model itself uses for these positions, independent of earlier forwards.

        It is called in every forward, from any thread, and must not change the module.

        Raises
        ------
        UnsupportedModelError
            If the module scales its tables differently from what it declares, or its frequencies are offloaded.
        """
        module = decoder.get_submodule(source.module)
        if rope_type(module, source) in LENGTH_DEPENDENT:
            module = _fresh(module, source)
            which = {} if source.layer_type is None else {"layer_type": source.layer_type}
            with torch.no_grad():
                x = torch.empty(0, device=position_ids_BL.device)
                table = type(module).forward(module, x, position_ids_BL, **which)  # without hooks
            _check_scaling(module, table, float(getattr(module, f"{source.prefix}attention_scaling", 1.0)))
        inv_freq: Any = getattr(module, f"{source.prefix}inv_freq")
        if inv_freq.is_meta:
            raise UnsupportedModelError(
                f"the frequencies of {type(module).__name__} are offloaded. Offload parameters only "
                "(offload_buffers=False)."
            )
        scaling: Any = getattr(module, f"{source.prefix}attention_scaling", 1.0)
        kind = rope_type(module, source)
        with torch.inference_mode(False):  # later forwards, which may train, use them too
            frequencies = inv_freq.detach().clone()
            return Rotary(frequencies, float(scaling), theta=self.theta(decoder, source), scaling=kind)

    def theta(self, decoder: nn.Module, source: RotarySource) -> float | None:
        """Base of the model's frequencies ``theta ** (-2 c / dim)``, from its configuration."""
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
    """The rope type that a rotary module uses for a source."""
    kind: Any = getattr(module, "rope_type", "default")
    return str(kind.get(source.layer_type, "default") if isinstance(kind, dict) else kind)


def _fresh(module: nn.Module, source: RotarySource) -> nn.Module:
    """A copy of a rotary module with its initial frequencies; the module itself depends on its last forward."""
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
    """Raise if the tables are scaled by an undeclared factor, as in Phi-3.5-MoE beyond the original window."""
    cos, sin = (table.real, table.imag) if isinstance(table, Tensor) else table
    scaling = float(torch.hypot(cos[0, -1].float(), sin[0, -1].float()).mean())
    if abs(scaling - declared) > 1e-3 * declared:
        raise UnsupportedModelError(
            f"{type(module).__name__} scales its tables by {scaling:.4g} at this length, and declares "
            f"attention_scaling={declared:.4g}: posenc cannot follow its frequencies."
        )
