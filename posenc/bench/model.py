"""Whole models: prefill, decoding one token with a filled cache, and padded batches.

Weights are random, because times do not depend on them, and both sides share them.
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
from posenc.bench.cases import BenchCase
from posenc.bench.padded import RowByRow
from posenc.bench.shapes import SHAPES, row_lengths
from posenc.bench.timing import Pair
from posenc.hf.random_models import empty_cache, random_llama
from posenc.hf.transformers_names import cache_argument
from posenc.rope import Rotary


def build(case: BenchCase) -> Pair:
    """Build both sides of a ``prefill``, ``decode`` or ``padded`` case."""
    stock = make_model(case)
    patched = twin(stock)
    posenc.apply(patched, case.make_strategy(), backend=case.backend)
    tokens = torch.arange(case.length)[None] * 7919 % stock.config.vocab_size
    if case.kind == "prefill":
        return Pair(Prefill(stock, tokens), Prefill(patched, tokens))
    if case.kind == "decode":
        return Pair(*decoders(stock, patched, tokens))
    rows = [tokens[:, :length] for length in row_lengths(case.length)]
    return Pair(RowByRow([Prefill(patched, row) for row in rows]), padded_batch(patched, rows))


def make_model(case: BenchCase) -> Any:
    """Make a random model of the case's shape."""
    return random_llama(getattr(torch, case.dtype), **SHAPES[case.shape])


def twin(model: nn.Module) -> Any:
    """Copy a model: the copy has its own modules and configuration and shares every weight."""
    shared = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


@dataclass
class Prefill:
    """A forward of a prompt with an empty cache; returns the logits of its last token."""

    model: Any
    tokens_BL: Tensor
    mask_BL: Tensor | None = None

    def __call__(self) -> Tensor:
        output = self.model(self.tokens_BL, attention_mask=self.mask_BL, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits


@dataclass
class Decode:
    """A forward of one more token with a cache that grows with every call, as in generation; returns its logits."""

    model: Any
    cache: Any

    def __call__(self) -> Tensor:
        token = torch.ones((1, 1), dtype=torch.long)
        output = self.model(token, **cache_argument(self.model, self.cache), use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1]
        return logits


def padded_batch(model: Any, rows: list[Tensor]) -> Prefill:
    """Build the prefill of all rows as one batch, padded on the left."""
    longest = max(row.shape[1] for row in rows)
    tokens = torch.zeros((len(rows), longest), dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, longest - row.shape[1] :] = row
        mask[index, longest - row.shape[1] :] = 1
    return Prefill(model, tokens, mask)


def decoders(stock: Any, patched: Any, tokens_BL: Tensor) -> tuple[Decode, Decode]:
    """Build decoding steps of both models, on caches that hold the same random keys and values.

    A prefill of this length would take minutes. So the patched model runs its prefill without its layers: its hooks
    record lengths and positions on the cache as they do for any prompt. Keys and values are added to the caches
    afterwards: raw keys for the patched model, rotated keys for the stock model.
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
    """Remove the layers of the decoder inside the block."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList()
    try:
        yield
    finally:
        model.model.layers = layers
