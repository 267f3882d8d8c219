"""What a patched model remembers: the strategy in force, the measured layers, the plans, and announced prompt lengths.

``posenc.apply`` makes one :class:`Attachment` per model, and all hooks of the model share it. At the start of every
forward the decoder's hook takes a :class:`Layers` from it, which goes down to the attention layers with the step.

Shape letters: B batch, L new tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from posenc.adapter import ArchitectureAdapter, LayerFacts
from posenc.config import CacheMode
from posenc.errors import InvalidInputError
from posenc.hf.model_frequencies import Base, ModelFrequencies
from posenc.hf.stock import StockAttention, stock_attention
from posenc.planning.planner import Planner
from posenc.positions import PositionStrategy

Announced = tuple[tuple["Attachment", int | list[int]], ...]

_announced: ContextVar[Announced] = ContextVar("posenc_announced", default=())
"""Announcements in force in this thread or task, the innermost first."""

_adapter_reads: ContextVar[bool] = ContextVar("posenc_adapter_reads", default=False)
"""True while an adapter reads the model's frequencies in this thread or task."""

_count_lock = threading.Lock()


@dataclass
class Attachment:
    """What the hooks of one patched model share.

    Parameters
    ----------
    strategy : PositionStrategy
        The strategy in force.
    adapter : ArchitectureAdapter
        Says where the model's family keeps its parts.
    backend : str
        Backend name or ``"auto"``.
    original : str
        The attention implementation that the model was loaded with, restored when the hooks are removed.
    cache : {"rotated", "raw"}
        Whether decoding keeps rotated copies of the keys beside the raw ones.
    facts : dict of LayerFacts
        What the probe measured, by attention module, in the order of the forward pass.
    rotaries : tuple of str
        Names of the decoder's rotary modules that are hooked.
    open_announcements : int
        How many announced prompt lengths are in force, in any thread.

    Attributes
    ----------
    planner : Planner
        Makes and keeps the strategy's plans.
    fingerprint : str
        Identifies the strategy; a cache can only be read under the strategy that filled it.
    batches : OpenBatches
        Continuous batching that runs on the model (``posenc/hf/continuous_batching.py``).
    custom_rotary : bool
        Whether the adapter overrides ``rotary``, for which it may run the model's rotary modules.
    """

    strategy: PositionStrategy
    adapter: ArchitectureAdapter
    backend: str
    original: str
    cache: CacheMode = "rotated"
    planner: Planner = field(init=False)
    fingerprint: str = field(init=False)
    facts: dict[nn.Module, LayerFacts] = field(default_factory=dict, repr=False)
    rotaries: tuple[str, ...] = ()
    batches: Any = field(init=False, repr=False)
    open_announcements: int = 0
    custom_rotary: bool = field(init=False)
    _frequencies: ModelFrequencies = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.custom_rotary = type(self.adapter).rotary is not ArchitectureAdapter.rotary
        self._frequencies = ModelFrequencies(self.adapter)
        self.planner = Planner(self.strategy)
        self.fingerprint = self.strategy.fingerprint

    def layers(self, decoder: nn.Module, position_ids_BL: Tensor) -> Layers:
        """Return what the attention layers of one forward share."""
        return Layers(self, decoder, self.bases(decoder, position_ids_BL))

    def bases(self, decoder: nn.Module, position_ids_BL: Tensor) -> dict[LayerFacts, Base]:
        """Return the model's own frequencies by kind of layer, as the same objects until they change.

        Parameters
        ----------
        decoder : Module
            The decoder that holds the rotary modules.
        position_ids_BL : int64 [B, L]
            Position ids of the forward; frequencies may follow the longest row.
        """
        if not self.custom_rotary:
            return self._frequencies.bases(decoder, self.facts.values(), position_ids_BL)
        token = _adapter_reads.set(True)
        try:
            return self._frequencies.bases(decoder, self.facts.values(), position_ids_BL)
        finally:
            _adapter_reads.reset(token)

    @property
    def reach(self) -> int | None:
        """How many tokens the model's masks reach back if every layer has a sliding window, else None."""
        widths = [facts.sliding_window for facts in self.facts.values()]
        sliding = [width for width in widths if width is not None]
        return max(sliding) if sliding and len(sliding) == len(widths) else None

    @cached_property
    def witnesses(self) -> tuple[tuple[int, int], ...]:
        """``(layer, channel)`` pairs whose cached keys can show that a cache was changed, the best choice first.

        Layers without a sliding window come first, then those with rotary positions, then the last in the model. The
        channel is one that the layer rotates.
        """
        candidates = [
            (facts.sliding_window is not None, facts.source is None, -index, index, (facts.channels or (0, 0))[0])
            for module, facts in self.facts.items()
            if isinstance(index := getattr(module, "layer_idx", None), int)
        ]
        return tuple((index, channel) for *_, index, channel in sorted(candidates))

    @property
    def adapter_reads_rotary(self) -> bool:
        """True while an adapter runs the model's rotary modules in this thread: they return what they do unpatched."""
        return self.custom_rotary and _adapter_reads.get()

    def announced_rows(self, batch: int) -> list[int] | None:
        """Return the prompt lengths announced in this thread (or task), one per row, or None.

        Raises
        ------
        InvalidInputError
            If the number of announced lengths is not the batch size.
        """
        announced = next((lengths for owner, lengths in _announced.get() if owner is self), None)
        if announced is None or isinstance(announced, int):
            return None if announced is None else [announced] * batch
        if len(announced) != batch:
            raise InvalidInputError(
                f"prompt_length names {len(announced)} rows, but the batch has {batch}. "
                "Give one length, or one per row."
            )
        return announced

    @contextmanager
    def announcing(self, lengths: int | list[int]) -> Iterator[None]:
        """Announce prompt lengths, in tokens, to the forwards of this thread (or task) inside the block."""
        token = _announced.set(((self, lengths), *_announced.get()))
        with _count_lock:
            self.open_announcements += 1
        try:
            yield
        finally:
            with _count_lock:
                self.open_announcements -= 1
            _announced.reset(token)


@dataclass(frozen=True, eq=False)
class Layers:
    """What the attention layers of one forward share.

    Parameters
    ----------
    attachment : Attachment
        What the hooks of the model share.
    decoder : Module
        The decoder that the layers belong to.
    bases : mapping of LayerFacts to Base
        The model's own frequencies, for each kind of layer that has rotary positions.
    """

    attachment: Attachment
    decoder: nn.Module
    bases: Mapping[LayerFacts, Base]

    @property
    def facts(self) -> Mapping[nn.Module, LayerFacts]:
        """What the probe measured on every attention module."""
        return self.attachment.facts

    @property
    def backend(self) -> str:
        """Backend name or ``"auto"``."""
        return self.attachment.backend

    @cached_property
    def planners(self) -> Mapping[nn.Module, Planner]:
        """The planner of every attention module."""
        planner = self.attachment.planner
        return {module: planner.of(layer) for layer, module in enumerate(self.facts)}

    @cached_property
    def stock(self) -> StockAttention:
        """The model's own attention function, for identity plans."""
        return stock_attention(self.attachment.original, self.decoder)
