"""What the hooks of one patched model share."""

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
from posenc.hf.own_frequencies import Base, OwnFrequencies
from posenc.hf.stock import StockAttention, stock_attention
from posenc.planning.planner import Planner
from posenc.positions import PositionStrategy

Announced = tuple[tuple["Attachment", int | list[int]], ...]

_announced: ContextVar[Announced] = ContextVar("posenc_announced", default=())
"""Announcements in force in this thread or task, the innermost first."""

_asking: ContextVar[bool] = ContextVar("posenc_asking", default=False)

_counting = threading.Lock()


@dataclass
class Attachment:
    """What the hooks of one model share.

    Parameters
    ----------
    strategy : PositionStrategy
        The strategy in force.
    adapter : ArchitectureAdapter
        The family's facts.
    backend : str
        Backend name or ``"auto"``.
    original : str
        The attention implementation to restore.
    cache : {"rotated", "raw"}
        Whether decoding keeps rotated copies of the keys beside the raw ones.
    facts : dict of LayerFacts
        What the probe measured, by attention module, in the order of the forward pass.
    rotaries : tuple of str
        Names of the decoder's rotary modules that are hooked.
    batches : OpenBatches
        Continuous batching that runs on the model (``posenc/hf/continuous_batching.py``).
    open_announcements : int
        How many announcements of a prompt's length are in force, in any thread.
    own_rotary : bool
        Whether the adapter reads frequencies in a way of its own, and may run the model's rotary modules for it.

    Attributes
    ----------
    fingerprint : str
        What a cache must have been filled by.
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
    own_rotary: bool = field(init=False)
    _frequencies: OwnFrequencies = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.own_rotary = type(self.adapter).rotary is not ArchitectureAdapter.rotary
        self._frequencies = OwnFrequencies(self.adapter)
        self.planner = Planner(self.strategy)
        self.fingerprint = self.strategy.fingerprint

    def layers(self, decoder: nn.Module, position_ids_BL: Tensor) -> Layers:
        """What the attention layers of one forward share."""
        return Layers(self, decoder, self.bases(decoder, position_ids_BL))

    def bases(self, decoder: nn.Module, position_ids_BL: Tensor) -> dict[LayerFacts, Base]:
        """The model's own frequencies in the layout of every kind of layer, the same objects until they change."""
        if not self.own_rotary:
            return self._frequencies.bases(decoder, self.facts.values(), position_ids_BL)
        token = _asking.set(True)
        try:
            return self._frequencies.bases(decoder, self.facts.values(), position_ids_BL)
        finally:
            _asking.reset(token)

    @property
    def reach(self) -> int | None:
        """How far the model's masks reach back where every layer slides, in tokens; None where some see everything."""
        windows = [facts.sliding_window for facts in self.facts.values()]
        known = [window for window in windows if window is not None]
        return max(known) if known and len(known) == len(windows) else None

    @cached_property
    def witnesses(self) -> tuple[tuple[int, int], ...]:
        """Layers whose cached keys tell what became of a cache, with a channel that they rotate; the best first."""
        found = [
            (facts.sliding_window is not None, facts.source is None, -index, index, (facts.channels or (0, 0))[0])
            for module, facts in self.facts.items()
            if isinstance(index := getattr(module, "layer_idx", None), int)
        ]
        return tuple((index, channel) for *_, index, channel in sorted(found))

    @property
    def asking(self) -> bool:
        """True while an adapter asks the model's rotary modules in this thread: they answer as if unpatched."""
        return self.own_rotary and _asking.get()

    def announced_rows(self, batch: int) -> list[int] | None:
        """Prompt lengths announced in this thread (or task), one per row."""
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
        """Announce prompt lengths to the forwards of this thread (or task)."""
        token = _announced.set(((self, lengths), *_announced.get()))
        with _counting:
            self.open_announcements += 1
        try:
            yield
        finally:
            with _counting:
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
        The model's own frequencies, in the layout of each kind of layer that has some.
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
