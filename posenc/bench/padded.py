"""The ``padded_attention`` case: the attention of one layer of a patched model for a padded batch.

It measures what padding costs in the remapped attention alone. A whole model also computes its linear layers on
padding, patched or not; ``padded`` measures that.

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posenc.adapter import ArchitectureAdapter, LayerFacts, RotarySource
from posenc.bench.attention import THETA
from posenc.bench.cases import BenchCase
from posenc.bench.shapes import Heads, row_lengths
from posenc.bench.timing import Pair
from posenc.hf.attachment import Attachment, Layers
from posenc.hf.cache.record import empty_record
from posenc.hf.cache.state import CachedTokens
from posenc.hf.layer_call import LayerCall
from posenc.hf.model_frequencies import Base
from posenc.hf.step import Step
from posenc.positions import PositionStrategy
from posenc.rope import Rotary

ADAPTER = ArchitectureAdapter("bench", "a single layer", ("*",))


@dataclass
class LayerAttention:
    """The attention of left-padded rows as a layer of a patched model runs it; returns the last tokens' outputs."""

    step: Step
    module: nn.Module
    q_BHLD: Tensor
    k_BHLD: Tensor
    v_BHLD: Tensor

    def __call__(self) -> Tensor:
        call = LayerCall(self.module, self.q_BHLD, self.k_BHLD, self.v_BHLD, None, None, 0.0, {})
        out_BLHD, _ = self.step.attend(call)
        return out_BLHD[:, -1]


@dataclass
class RowByRow:
    """The rows of a padded batch one after the other, without padding; returns their outputs as one batch."""

    rows: Sequence[Callable[[], Tensor]]

    def __call__(self) -> Tensor:
        return torch.cat([row() for row in self.rows])


def build(case: BenchCase) -> Pair:
    """Build both sides of a ``padded_attention`` case, on the same random tensors."""
    heads, dtype, lengths = Heads.parse(case.shape), getattr(torch, case.dtype), row_lengths(case.length)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(len(lengths), count, case.length, heads.dim, generator=generator, dtype=dtype)
        for count in (heads.query, heads.key, heads.key)
    )
    strategy = case.make_strategy()

    def layer(rows: slice, longest: int) -> LayerAttention:
        tensors = (x[rows, :, case.length - longest :] for x in (q, k, v))
        module = nn.Module()
        return LayerAttention(_step(strategy, module, lengths[rows], heads.dim, case.backend), module, *tensors)

    single_rows = [layer(slice(row, row + 1), length) for row, length in enumerate(lengths)]
    return Pair(RowByRow(single_rows), layer(slice(None), case.length))


def _step(strategy: PositionStrategy, module: nn.Module, lengths: list[int], dim: int, backend: str) -> Step:
    """The step of a forward with an empty cache, for rows that are padded on the left to the longest."""
    ids_BL = torch.arange(max(lengths)).expand(len(lengths), -1)
    padding_B1 = max(lengths) - torch.tensor(lengths)[:, None]
    real_BL = ids_BL >= padding_B1
    facts = LayerFacts(RotarySource("rotary_emb"))
    attachment = Attachment(strategy, ADAPTER, backend, "sdpa", facts={module: facts})
    record = empty_record(attachment.fingerprint, len(lengths), ids_BL.device).extended(
        0, (ids_BL - padding_B1).clamp(min=0), real_BL, attachment.planner
    )
    bases = {facts: Base(Rotary.from_theta(THETA, dim))}
    return Step(CachedTokens(record, 0, record), Layers(attachment, module, bases))
