"""The rotary frequencies that the model itself declares, as a function of length.

The hooks read them through the adapter at the start of every forward, and a strategy starts from them.

A checkpoint with ``dynamic`` or ``longrope`` frequencies changes them inside its rotary module, and the module keeps
those of its last forward. They therefore depend on the longest row of the batch and on what ran before. Under the
identity plan posenc uses exactly these frequencies, as the unpatched model does. Under any other plan each row gets
the frequencies of its own length.

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
"""How many sets of frequencies and how many layouts of them are kept; the oldest are dropped first."""


@dataclass(frozen=True, eq=False)
class Base:
    """The model's frequencies in one kind of layer, for one forward.

    Parameters
    ----------
    stock : Rotary
        What the model's own rotary module uses in this forward, for all rows.
    by_length : callable or None
        Maps the length of a row, in tokens, to its frequencies. None if they do not depend on the length.
    """

    stock: Rotary
    by_length: Callable[[int], Rotary] | None = None

    def at(self, length: int) -> Rotary:
        """Return the frequencies of a row of ``length`` tokens, whatever the other rows are."""
        return self.stock if self.by_length is None else self.by_length(length)

    def runs(self, low: int, high: int, prompt: int) -> list[tuple[int, int, Rotary]]:
        """Return ``(from, to, frequencies)`` of a row's tokens ``low .. high - 1`` under a plan for ``prompt`` tokens.

        All tokens of the prompt share the frequencies of the prompt's length. A token decoded after it has the
        frequencies of the length that the row reaches with it.
        """
        if self.by_length is None or high <= prompt:
            return [(low, high, self.at(max(prompt, 1)))]
        runs: list[tuple[int, int, Rotary]] = []
        for index in range(max(low, prompt - 1), high):
            rotary = self.at(max(prompt, index + 1))
            if runs and runs[-1][2] == rotary:
                runs[-1] = (runs[-1][0], index + 1, rotary)
            else:
                runs.append((index if runs else low, index + 1, rotary))
        return runs


class ModelFrequencies:
    """Reads a model's frequencies through its adapter, and keeps them until the model changes them.

    Parameters
    ----------
    adapter : ArchitectureAdapter
        Says how the family stores its frequencies.
    """

    def __init__(self, adapter: ArchitectureAdapter) -> None:
        self.adapter = adapter
        self._lock = threading.Lock()
        self._by_length: dict[tuple[RotarySource, int], tuple[tuple[Any, ...], Rotary]] = {}
        self._layouts: dict[tuple[LayerFacts, int], tuple[Rotary, Rotary]] = {}

    def __reduce__(self) -> tuple[type[ModelFrequencies], tuple[ArchitectureAdapter]]:
        """Copies and pickles of a model read its frequencies again."""
        return ModelFrequencies, (self.adapter,)

    def bases(self, decoder: nn.Module, kinds: Iterable[LayerFacts], position_ids_BL: Tensor) -> dict[LayerFacts, Base]:
        """Return the frequencies of a forward, for every kind of layer that has rotary positions."""
        bases = {}
        for facts in dict.fromkeys(kinds):
            if facts.source is not None:
                module = decoder.get_submodule(facts.source.module)
                follows = rope_type(module, facts.source) in LENGTH_DEPENDENT
                stock = self._stock(decoder, module, facts.source, position_ids_BL, follows=follows)
                by_length = partial(self.at, decoder, facts) if follows else None
                bases[facts] = Base(self._in_layout(facts, stock), by_length)
        return bases

    def at(self, decoder: nn.Module, facts: LayerFacts, length: int) -> Rotary:
        """Return the frequencies of a kind of layer for a row of ``length`` tokens."""
        assert facts.source is not None
        module = decoder.get_submodule(facts.source.module)
        return self._in_layout(facts, self._at(decoder, module, facts.source, length))

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
        rotary = self._at(decoder, module, source, length)
        return replace(rotary, inv_freq=kept.detach().clone()) if kept is not None and self._reads_buffers else rotary

    @property
    def _reads_buffers(self) -> bool:
        """Whether the adapter reads the rotary module's buffers: true unless it overrides ``rotary``."""
        return type(self.adapter).rotary is ArchitectureAdapter.rotary

    def _read(
        self, decoder: nn.Module, module: nn.Module, source: RotarySource, position_ids_BL: Tensor, length: int
    ) -> Rotary:
        """Return what the adapter reads: the same object for as long as the model's own tensors are the same.

        ``length`` is the length in tokens that they are kept for, 0 if they do not depend on it.
        """
        if not self._reads_buffers:  # only the adapter knows what its frequencies depend on
            rotary = self.adapter.rotary(decoder, source, position_ids_BL)
            with self._lock:
                entry = self._by_length.get((source, length))
                if entry is None or entry[1] != rotary:
                    entry = self._keep((source, length), (), rotary)
                return entry[1]
        state = _state(module, source)
        with self._lock:
            entry = self._by_length.get((source, length))
        if entry is None or entry[0] != state:
            rotary = self.adapter.rotary(decoder, source, position_ids_BL)
            with self._lock:
                entry = self._keep((source, length), state, rotary)
        return entry[1]

    def _keep(self, key: tuple[RotarySource, int], state: tuple[Any, ...], rotary: Rotary) -> tuple[Any, Rotary]:
        while len(self._by_length) >= KEPT:
            self._by_length.pop(next(iter(self._by_length)))
        self._by_length[key] = (state, rotary)
        return self._by_length[key]

    def _in_layout(self, facts: LayerFacts, base: Rotary) -> Rotary:
        with self._lock:
            entry = self._layouts.get((facts, id(base)))
            if entry is None or entry[0] is not base:
                while len(self._layouts) >= KEPT:
                    self._layouts.pop(next(iter(self._layouts)))
                entry = self._layouts[facts, id(base)] = (base, facts.of(base))
            return entry[1]


def _inv_freq(module: nn.Module, source: RotarySource) -> Tensor:
    inv_freq: Any = getattr(module, f"{source.prefix}inv_freq")
    return inv_freq  # type: ignore[no-any-return]


def _state(module: nn.Module, source: RotarySource) -> tuple[Any, ...]:
    """Return a value that changes when the frequencies are changed (the original ones, if they follow the length)."""
    follows = rope_type(module, source) in LENGTH_DEPENDENT
    inv_freq: Any = getattr(module, f"{source.prefix}original_inv_freq", None) if follows else None
    inv_freq = _inv_freq(module, source) if inv_freq is None else inv_freq
    version = None if inv_freq.is_inference() else inv_freq._version
    return id(inv_freq), inv_freq.data_ptr(), version, getattr(module, f"{source.prefix}attention_scaling", 1.0)


def _threshold(module: nn.Module, source: RotarySource) -> int | None:
    """Return the length up to which the module uses its original frequencies, or None if it does not say."""
    config: Any = getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(source.layer_type) or parameters
    if rope_type(module, source) == "longrope":
        threshold = parameters.get("original_max_position_embeddings")
    else:
        threshold = getattr(module, "original_max_seq_len", None)
    return int(threshold) if threshold else None


def _kept_by_module(module: nn.Module, source: RotarySource, length: int) -> Tensor | None:
    """Return the frequencies of an earlier, longer forward that a dynamic module still uses at this length, or None."""
    original = getattr(module, "original_max_seq_len", None)
    longest = getattr(module, f"{source.prefix}max_seq_len_cached", getattr(module, "max_seq_len_cached", None))
    if rope_type(module, source) != "dynamic" or original is None or longest is None:
        return None
    return (
        _inv_freq(module, source) if int(original) <= length <= int(longest) and int(longest) > int(original) else None
    )
