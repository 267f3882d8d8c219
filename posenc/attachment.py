"""What the hooks of one patched model share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from posenc.adapter import LENGTH_DEPENDENT, ArchitectureAdapter, LayerFacts, RotarySource, rope_type
from posenc.config import CacheMode
from posenc.errors import InvalidInputError
from posenc.positions import PositionStrategy
from posenc.rope import Rotary
from posenc.schedule import Planner


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
    announced : int or list of int, optional
        Final prompt lengths of a chunked prefill.
    paused : bool
        True while the model's own rotary modules are asked for their frequencies.
    facts : dict of LayerFacts
        What the probe measured, by attention module, in the order of the forward pass.
    rotaries : tuple of str
        Names of the decoder's rotary modules that are hooked.
    batches : OpenBatches
        Continuous batching that runs on the model (``posenc/continuous.py``).

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
    announced: int | list[int] | None = None
    paused: bool = False
    planner: Planner = field(init=False)
    fingerprint: str = field(init=False)
    facts: dict[nn.Module, LayerFacts] = field(default_factory=dict, repr=False)
    rotaries: tuple[str, ...] = ()
    batches: Any = field(init=False, repr=False)
    _rotaries: dict[RotarySource, tuple[Tensor, int, Rotary]] = field(default_factory=dict, repr=False)
    _layouts: dict[LayerFacts, tuple[Rotary, Rotary]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.planner = Planner(self.strategy)
        self.fingerprint = self.strategy.fingerprint

    def planners(self) -> dict[nn.Module, Planner]:
        """The planner of every attention module."""
        return {module: self.planner.of(layer) for layer, module in enumerate(self.facts)}

    def bases(self, decoder: nn.Module, position_ids_BL: Tensor) -> dict[LayerFacts, Rotary]:
        """The model's own frequencies in the layout of every kind of layer, the same objects until they change."""
        bases = {}
        for facts in dict.fromkeys(self.facts.values()):
            if facts.source is not None:
                base = self._base(decoder, facts.source, position_ids_BL)
                known = self._layouts.get(facts)
                if known is None or known[0] is not base:
                    known = self._layouts[facts] = (base, facts.of(base))
                bases[facts] = known[1]
        return bases

    def _base(self, decoder: nn.Module, source: RotarySource, position_ids_BL: Tensor) -> Rotary:
        module = decoder.get_submodule(source.module)
        if rope_type(module, source) in LENGTH_DEPENDENT:
            self.paused = True
            try:
                return self.adapter.rotary(decoder, source, position_ids_BL)
            finally:
                self.paused = False
        inv_freq: Any = getattr(module, f"{source.prefix}inv_freq")
        known = self._rotaries.get(source)
        if known is None or known[0] is not inv_freq or known[1] != inv_freq._version:
            known = (inv_freq, inv_freq._version, self.adapter.rotary(decoder, source, position_ids_BL))
            self._rotaries[source] = known
        return known[2]

    def announced_rows(self, batch: int) -> list[int] | None:
        """Announced prompt lengths, one per row."""
        if self.announced is None or isinstance(self.announced, int):
            return None if self.announced is None else [self.announced] * batch
        if len(self.announced) != batch:
            raise InvalidInputError(
                f"prompt_length names {len(self.announced)} rows, but the batch has {batch}. "
                "Give one length, or one per row."
            )
        return self.announced
