"""The frequencies a model has itself, as a function of the length alone.

A checkpoint whose frequencies follow the length (dynamic, longrope) keeps those of its last forward in the rotary
module, so they depend on the longest row of the batch and on what ran before. Under the identity plan that is what
the model computes, and posenc follows it. Under any other plan a row gets the frequencies of its own length.

Shape letters: B batch, L tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from posenc.adapter import LENGTH_DEPENDENT, ArchitectureAdapter, LayerFacts, RotarySource, rope_type
from posenc.rope import Rotary

KEPT = 64
"""Lengths whose frequencies are kept, for every source."""


@dataclass(frozen=True, eq=False)
class Base:
    """The model's own frequencies in one kind of layer, for one forward.

    Parameters
    ----------
    stock : Rotary
        What the model's own rotary module uses in this forward, for all rows.
    own : callable or None
        Where they follow the length: what a row of a given length gets.
    """

    stock: Rotary
    own: Callable[[int], Rotary] | None = None

    def at(self, length: int) -> Rotary:
        """The frequencies of a row of ``length`` tokens, whatever its neighbours."""
        return self.stock if self.own is None else self.own(length)

    def runs(self, low: int, high: int, prompt: int) -> list[tuple[int, int, Rotary]]:
        """``(from, to, frequencies)`` of a row's tokens ``low .. high - 1`` under a plan for ``prompt`` tokens.

        The prompt's tokens share those of its length; a token decoded after it has those of the length it makes.
        """
        if self.own is None or high <= prompt:
            return [(low, high, self.at(max(prompt, 1)))]
        runs: list[tuple[int, int, Rotary]] = []
        for index in range(max(low, prompt - 1), high):
            rotary = self.at(max(prompt, index + 1))
            if runs and runs[-1][2] == rotary:
                runs[-1] = (runs[-1][0], index + 1, rotary)
            else:
                runs.append((index if runs else low, index + 1, rotary))
        return runs


class OwnFrequencies:
    """Reads a model's frequencies through its adapter, and keeps them until the model's own change."""

    def __init__(self, adapter: ArchitectureAdapter) -> None:
        self.adapter = adapter
        self._lock = threading.Lock()
        self._known: dict[tuple[RotarySource, int], tuple[tuple[Any, ...], Rotary]] = {}
        self._layouts: dict[tuple[LayerFacts, int], tuple[Rotary, Rotary]] = {}

    def __reduce__(self) -> tuple[type[OwnFrequencies], tuple[ArchitectureAdapter]]:
        """Copies and pickles of a model read its frequencies again."""
        return OwnFrequencies, (self.adapter,)

    def bases(self, decoder: nn.Module, kinds: Iterable[LayerFacts], position_ids_BL: Tensor) -> dict[LayerFacts, Base]:
        """The frequencies of a forward, for every kind of layer that has some."""
        bases = {}
        for facts in dict.fromkeys(kinds):
            if facts.source is not None:
                module = decoder.get_submodule(facts.source.module)
                follows = rope_type(module, facts.source) in LENGTH_DEPENDENT
                stock = self._stock(decoder, module, facts.source, position_ids_BL, follows=follows)
                own = partial(self.at, decoder, facts) if follows else None
                bases[facts] = Base(self._laid_out(facts, stock), own)
        return bases

    def at(self, decoder: nn.Module, facts: LayerFacts, length: int) -> Rotary:
        """The frequencies of a layer at a length in tokens."""
        assert facts.source is not None
        module = decoder.get_submodule(facts.source.module)
        return self._laid_out(facts, self._at(decoder, module, facts.source, length))

    def _at(self, decoder: nn.Module, module: nn.Module, source: RotarySource, length: int) -> Rotary:
        threshold = _threshold(module, source)
        if threshold is not None:  # up to it the original frequencies, beyond it one other set or one for each length
            longrope = rope_type(module, source) == "longrope"
            length = threshold + (length > threshold) if longrope else max(length, threshold)
        position_ids_11 = torch.tensor([[length - 1]], device=_inv_freq(module, source).device)
        return self._read(decoder, module, source, position_ids_11, length)

    def _stock(
        self, decoder: nn.Module, module: nn.Module, source: RotarySource, position_ids_BL: Tensor, *, follows: bool
    ) -> Rotary:
        if not follows:
            return self._read(decoder, module, source, position_ids_BL, 0)
        length = int(position_ids_BL.max()) + 1
        kept = _kept_by_module(module, source, length)
        read = self._at(decoder, module, source, length)
        return replace(read, inv_freq=kept.detach().clone()) if kept is not None and self._is_plain else read

    @property
    def _is_plain(self) -> bool:
        """Whether the adapter reads rotary modules as every adapter does unless it says otherwise."""
        return type(self.adapter).rotary is ArchitectureAdapter.rotary

    def _read(
        self, decoder: nn.Module, module: nn.Module, source: RotarySource, position_ids_BL: Tensor, key: int
    ) -> Rotary:
        """What the adapter says, the same object for as long as the model's own tensors are the same."""
        if not self._is_plain:  # only the adapter knows what its frequencies depend on
            made = self.adapter.rotary(decoder, source, position_ids_BL)
            with self._lock:
                known = self._known.get((source, key))
                if known is None or known[1] != made:
                    known = self._keep((source, key), (), made)
                return known[1]
        state = _state(module, source)
        with self._lock:
            known = self._known.get((source, key))
        if known is None or known[0] != state:
            made = self.adapter.rotary(decoder, source, position_ids_BL)
            with self._lock:
                known = self._keep((source, key), state, made)
        return known[1]

    def _keep(self, key: tuple[RotarySource, int], state: tuple[Any, ...], made: Rotary) -> tuple[Any, Rotary]:
        while len(self._known) >= KEPT:
            self._known.pop(next(iter(self._known)))
        self._known[key] = (state, made)
        return self._known[key]

    def _laid_out(self, facts: LayerFacts, base: Rotary) -> Rotary:
        with self._lock:
            known = self._layouts.get((facts, id(base)))
            if known is None or known[0] is not base:
                while len(self._layouts) >= KEPT:
                    self._layouts.pop(next(iter(self._layouts)))
                known = self._layouts[facts, id(base)] = (base, facts.of(base))
            return known[1]


def _inv_freq(module: nn.Module, source: RotarySource) -> Tensor:
    inv_freq: Any = getattr(module, f"{source.prefix}inv_freq")
    return inv_freq  # type: ignore[no-any-return]


def _state(module: nn.Module, source: RotarySource) -> tuple[Any, ...]:
    """Changes when a module's frequencies do; where they follow the length, when the original ones do."""
    follows = rope_type(module, source) in LENGTH_DEPENDENT
    inv_freq: Any = getattr(module, f"{source.prefix}original_inv_freq", None) if follows else None
    inv_freq = _inv_freq(module, source) if inv_freq is None else inv_freq
    version = None if inv_freq.is_inference() else inv_freq._version
    return id(inv_freq), inv_freq.data_ptr(), version, getattr(module, f"{source.prefix}attention_scaling", 1.0)


def _threshold(module: nn.Module, source: RotarySource) -> int | None:
    """The length up to which frequencies that follow it are the original ones, where the module says."""
    config: Any = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(source.layer_type) or parameters
    if rope_type(module, source) == "longrope":
        found = parameters.get("original_max_position_embeddings")
    else:
        found = getattr(module, "original_max_seq_len", None)
    return int(found) if found else None


def _kept_by_module(module: nn.Module, source: RotarySource, length: int) -> Tensor | None:
    """Frequencies of an earlier, longer forward that a dynamic module goes on using at this length, or None."""
    original = getattr(module, "original_max_seq_len", None)
    reached = getattr(module, f"{source.prefix}max_seq_len_cached", getattr(module, "max_seq_len_cached", None))
    if rope_type(module, source) != "dynamic" or original is None or reached is None:
        return None
    return (
        _inv_freq(module, source) if int(original) <= length <= int(reached) and int(reached) > int(original) else None
    )
