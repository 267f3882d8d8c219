"""Whole models: prefill, decoding one token at a filled cache, and padded batches.

Weights are random (time does not depend on them) and shared by the two sides.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import posenc
from posenc.bench.cases import SHAPES, Case, row_lengths
from posenc.bench.timing import Pair
from posenc.hf.random_models import empty_cache, random_llama
from posenc.hf.transformers_names import cache_argument
from posenc.rope import Rotary


def build(case: Case) -> Pair:
    """Both sides of a ``prefill``, ``decode`` or ``padded`` case."""
    stock = make_model(case)
    patched = twin(stock)
    posenc.apply(patched, case.make_strategy(), backend=case.backend)
    tokens = torch.arange(case.length)[None] * 7919 % stock.config.vocab_size
    if case.kind == "prefill":
        return Pair(Prefill(stock, tokens), Prefill(patched, tokens))
    if case.kind == "decode":
        return Pair(*decoders(stock, patched, tokens))
    rows = [tokens[:, :length] for length in row_lengths(case)]
    return Pair(RowByRow(patched, rows), padded_batch(patched, rows))


def make_model(case: Case) -> Any:
    """A random model of the case's shape."""
    return random_llama(getattr(torch, case.dtype), **SHAPES[case.shape])


def twin(model: nn.Module) -> Any:
    """A copy with its own modules and configuration that shares every weight."""
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


@dataclass
class Prefill:
    """A prompt on an empty cache; returns the logits of its last token."""

    model: Any
    tokens_BL: Tensor
    mask_BL: Tensor | None = None

    def __call__(self) -> Tensor:
        output = self.model(self.tokens_BL, attention_mask=self.mask_BL, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits


@dataclass
class RowByRow:
    """Several prompts, one after the other."""

    model: Any
    rows: list[Tensor]

    def __call__(self) -> Tensor:
        return torch.cat([Prefill(self.model, row)() for row in self.rows])


@dataclass
class Decode:
    """One more token on a cache that grows with every call, as in generation; returns its logits."""

    model: Any
    cache: Any

    def __call__(self) -> Tensor:
        token = torch.ones((1, 1), dtype=torch.long)
        output = self.model(token, **cache_argument(self.model, self.cache), use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits


def padded_batch(model: Any, rows: list[Tensor]) -> Prefill:
    """The rows as one batch, padded on the left."""
    longest = max(row.shape[1] for row in rows)
    tokens = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, longest - row.shape[1] :] = row
        mask[index, longest - row.shape[1] :] = 1
    return Prefill(model, tokens, mask)


def decoders(stock: Any, patched: Any, tokens_BL: Tensor) -> tuple[Decode, Decode]:
    """Both models on caches that hold the same random keys and values.

    A prefill of this length would take minutes. So the patched model runs its prefill with its layers
    taken out, which lets its hooks note lengths and positions on the cache as they do for any prompt, and
    the keys and values are put in afterwards: raw ones for the patched model, rotated ones for stock.
    """
    config, length = stock.config, tokens_BL.shape[1]
    plain, raw = empty_cache(config), empty_cache(config)
    with torch.no_grad(), without_layers(patched):
        patched(tokens_BL, **cache_argument(patched, raw), use_cache=True, logits_to_keep=1)
    generator = torch.Generator().manual_seed(1)
    dim = config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, length, dim)
    rotary = Rotary(stock.model.rotary_emb.inv_freq)
    for layer in range(config.num_hidden_layers):
        k, v = (torch.randn(shape, generator=generator, dtype=stock.dtype) for _ in range(2))
        raw.update(k, v, layer)
        plain.update(rotary.rotate_as_stock(k, torch.arange(length)[None]), v, layer)
    return Decode(stock, plain), Decode(patched, raw)


@contextmanager
def without_layers(model: Any) -> Iterator[None]:
    """The decoder without its layers, for the length of the block."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList()
    try:
        yield
    finally:
        model.model.layers = layers
