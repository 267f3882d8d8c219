"""What the rows of a static cache will see until it is full, as tensors that a compiled step reads.

A compiled step cannot ask Python for a plan. So the eager forward before it (a prompt, or a new turn) lays out
everything that depends on lengths alone: which plan each future token uses, its key intervals and positions.
Positions rather than cos/sin tables: they are 2 F times smaller, and the step makes one table of them for each
kind of layer, however many segments and re-plans there are.

Shape letters: B batch, R rows (1 where all are alike), N plans, S segments, T cache slots, L new slots,
F frequencies.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from posenc.adapter import LENGTH_DEPENDENT, LayerFacts, RotarySource, rope_type
from posenc.hf.attachment import Attachment
from posenc.hf.cache.record import CacheRecord, Row, Spans, join_spans
from posenc.hf.own_frequencies import Base
from posenc.hf.stock import StockAttention, stock_attention
from posenc.plan import PositionPlan
from posenc.planning.planner import KEPT_PLANS
from posenc.planning.schedule import Schedule
from posenc.rope import Rotary
from posenc.segment import IntArray

logger = logging.getLogger("posenc")

ATTRIBUTE = "_posenc_horizon"


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of attention layer, until the cache is full.

    Parameters
    ----------
    rotary : Rotary or None
        Its layout; None for a layer without rotary positions.
    stock : bool
        The model's own attention with this rotary computes every plan.
    window : int or None
        Its own sliding window.
    inv_freq_NF, factor_N : float64 [N, F], [N]
        Frequencies of every plan, and the factor on its cos and sin.
    """

    rotary: Rotary | None
    stock: bool
    window: int | None
    inv_freq_NF: Tensor
    factor_N: Tensor


@dataclass(eq=False)
class Horizon:
    """Everything a compiled step needs, for every length until the cache is full.

    Parameters
    ----------
    fingerprint : str
        The strategy it was laid out for.
    futures : tuple of Schedule
        Each row's schedule until the cache is full.
    laid_at : int
        Slots that were filled when it was laid out.
    spans : tuple of Spans
        Each row's real slots among those.
    kinds : tuple of Kind
        Kinds of layers.
    kind_of : dict of int
        Index of a module's kind, for every attention module.
    stock : callable
        The model's own attention function.
    count : int64 []
        Slots filled so far; a compiled step counts it up.
    position_ids_BT : int64 [B, T]
        Position ids as the model was given them; a compiled step adds its own.
    real_RT, index_RT : bool and int64 [R, T]
        Which slots hold real tokens, and which of the row's real tokens each one is.
    plan_RT : int64 [R, T]
        Which plan the row's i-th real token uses.
    key_start_NTS, key_stop_NTS : int64 [N, T, S]
        Key intervals of query i.
    query_NTS, key_NTS : float64 [N, T, S] or [N, T, S, F]
        Rotary positions of query i and key j.
    scale_NT : float64 [N, T] or None
        Factor on the logits of query i.
    """

    fingerprint: str
    futures: tuple[Schedule, ...]
    laid_at: int
    spans: tuple[Spans, ...]
    kinds: tuple[Kind, ...]
    kind_of: Mapping[nn.Module, int]
    stock: StockAttention
    count: Tensor
    position_ids_BT: Tensor
    real_RT: Tensor
    index_RT: Tensor
    plan_RT: Tensor
    key_start_NTS: Tensor
    key_stop_NTS: Tensor
    query_NTS: Tensor
    key_NTS: Tensor
    scale_NT: Tensor | None

    def __post_init__(self) -> None:
        for value in vars(self).values():
            if isinstance(value, Tensor):
                torch._dynamo.mark_static_address(value)

    def __deepcopy__(self, memo: dict[int, object]) -> Horizon:
        """A cache's copy counts on its own; the plans never change, and the modules are the model's."""
        return replace(self, count=self.count.clone(), position_ids_BT=self.position_ids_BT.clone())

    def __reduce__(self) -> tuple[type[NoHorizon], tuple[str]]:
        return NoHorizon, ("it was pickled, and the model is not part of it",)

    def expects(self, record: CacheRecord) -> bool:
        """Whether the rows went where this horizon said they would."""
        return (
            self.fingerprint == record.fingerprint
            and len(self.futures) == len(record.rows)
            and all(
                row.spans == join_spans(own, ((self.laid_at, record.slots),))
                and future.cropped(row.length) == row.schedule
                for row, future, own in zip(record.rows, self.futures, self.spans, strict=True)
            )
        )

    def advance(self, record: CacheRecord) -> None:
        """Take over what eager steps recorded."""
        self.position_ids_BT[:, : record.slots] = record.position_ids_BT
        self.count.fill_(record.slots)

    def settle(self, record: CacheRecord, attachment: Attachment) -> CacheRecord:
        """The record, with the tokens that compiled steps decoded since."""
        now = int(self.count)
        if self.fingerprint != record.fingerprint or now <= record.slots:
            return record
        ids_BL = self.position_ids_BT[:, record.slots : now]
        return record.extended(record.slots, ids_BL, None, attachment.planner, candidates=now - record.slots)


@dataclass
class NoHorizon:
    """Why compiled steps on this cache run the ordinary way, with graph breaks."""

    reason: str
    told: bool = False

    def tell(self) -> None:
        """Log the reason, once per cache."""
        if not self.told:
            logger.warning("torch.compile: every token of this cache breaks the graph, since %s.", self.reason)
            self.told = True


def look_ahead(
    cache: Any,
    record: CacheRecord,
    past: int,
    attachment: Attachment,
    decoder: nn.Module,
    bases: Mapping[LayerFacts, Base],
    *,
    compiling: bool,
) -> None:
    """After the record of a forward: lay out the future of a static cache, or move it on by one token."""
    static = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "max_cache_len")]
    if not static:
        return
    known = getattr(cache, ATTRIBUTE, None)
    if past and record.slots == past + 1 and known is not None:
        if isinstance(known, NoHorizon):
            if compiling:
                known.tell()
            return
        if record.slots <= known.position_ids_BT.shape[1] and known.expects(record):
            known.advance(record)
            return
    slots = max((layer.max_cache_len for layer in static if not layer.is_sliding), default=0)
    setattr(cache, ATTRIBUTE, _lay_out(record, slots, attachment, decoder, bases))


def _lay_out(
    record: CacheRecord, slots: int, attachment: Attachment, decoder: nn.Module, bases: Mapping[LayerFacts, Base]
) -> Horizon | NoHorizon:
    planner, left = attachment.planner, slots - record.slots
    if slots == 0:
        return NoHorizon("all its layers slide, so there is no length at which it is full")
    if any(not row.spans for row in record.rows):
        return NoHorizon("a row holds nothing but padding")
    if any(_follows_the_length(decoder, facts.source) for facts in bases):
        return NoHorizon("the model's own frequencies follow the length")
    if planner.by_layer:
        return NoHorizon("its layers see different positions")
    found = [planner.future(row.schedule, row.length, row.length + left) for row in record.rows]
    futures = tuple(future for future in found if future is not None)
    if len(futures) < len(found):
        return NoHorizon(f"its rows re-plan, or try to, more than {KEPT_PLANS} times before the cache is full")
    prompts = [_prompts(row, future, slots) for row, future in zip(record.rows, futures, strict=True)]
    distinct = sorted({int(prompt) for own in prompts for prompt in own})
    if len(distinct) > KEPT_PLANS:
        return NoHorizon(f"its rows use more than {KEPT_PLANS} plans before the cache is full")
    plans = [planner.plan(prompt, slots) for prompt in distinct]
    if any(plan.interpolates_logits for plan in plans):
        return NoHorizon("the strategy interpolates logits")
    device = record.position_ids_BT.device
    facts = list(dict.fromkeys(attachment.facts.values()))
    kinds = tuple(_kind(own, bases.get(own), plans, attachment) for own in facts)
    if not all(kind.stock for kind in kinds) and not all(row.consecutive for row in record.rows):
        return NoHorizon("position ids do not count up by one")
    shown = record.rows[:1] if all(row == record.rows[0] for row in record.rows) else record.rows
    real_RT = np.stack([_real(row, record.slots, slots) for row in shown])
    position_ids_BT = torch.zeros((len(record.rows), slots), dtype=torch.long, device=device)
    position_ids_BT[:, : record.slots] = record.position_ids_BT
    scaled = any(plan.query_scale is not None for plan in plans)
    scales = [np.ones(slots) if plan.query_scale is None else plan.query_scale for plan in plans]

    def moved(x: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    return Horizon(
        record.fingerprint,
        futures,
        record.slots,
        tuple(row.spans for row in record.rows),
        kinds,
        {module: facts.index(own) for module, own in attachment.facts.items()},
        stock_attention(attachment.original, decoder),
        torch.tensor(record.slots, device=device),
        position_ids_BT,
        moved(real_RT),
        moved(np.maximum(real_RT.cumsum(1) - 1, 0)),
        moved(np.searchsorted(distinct, prompts[: len(shown)])),
        moved(_segments(plans, "key_start")),
        moved(_segments(plans, "key_stop")),
        moved(_segments(plans, "query_positions").astype(np.float64)),
        moved(_segments(plans, "key_positions").astype(np.float64)),
        moved(np.stack(scales)) if scaled else None,
    )


def _follows_the_length(decoder: nn.Module, source: RotarySource | None) -> bool:
    return source is not None and rope_type(decoder.get_submodule(source.module), source) in LENGTH_DEPENDENT


def _prompts(row: Row, future: Schedule, slots: int) -> IntArray:
    """Prompt length of the plan that the row's i-th real token uses, int64 [T]."""
    prompts = np.full(slots, future.prompt_at(row.length), dtype=np.int64)
    for start, prompt in future.entries:
        if start > row.length:
            prompts[start - 1 :] = prompt
    return prompts


def _real(row: Row, filled: int, slots: int) -> NDArray[np.bool_]:
    """Which slots hold, or will hold, real tokens: every decoded one does."""
    real = np.zeros(slots, dtype=bool)
    for start, stop in row.spans:
        real[start:stop] = True
    real[filled:] = True
    return real


def _kind(facts: LayerFacts, base: Base | None, plans: Sequence[PositionPlan], attachment: Attachment) -> Kind:
    if base is None:
        return Kind(None, True, facts.window, torch.empty(0), torch.empty(0))
    rotaries = [attachment.planner.rotary(base.stock, plan.prompt) for plan in plans]
    window = facts.window
    stock = all((plan if window is None else plan.clipped(window)).is_stock(window) for plan in plans)
    return Kind(
        rotaries[0],
        stock and len(set(rotaries)) == 1,
        window,
        torch.stack([rotary.inv_freq.double() for rotary in rotaries]),
        torch.tensor([rotary.attention_scaling for rotary in rotaries], dtype=torch.float64),
    )


def _stack(arrays: Sequence[NDArray[Any]], axis: int) -> NDArray[Any]:
    """Stack arrays of which some have one more dimension, for positions that differ by frequency."""
    rank = max(array.ndim for array in arrays)
    same = [array if array.ndim == rank else array[..., None] for array in arrays]
    return np.stack(np.broadcast_arrays(*same), axis)


def _segments(plans: Sequence[PositionPlan], name: str) -> NDArray[Any]:
    """One array of every segment of every plan, [N, T, S] or [N, T, S, F]; empty segments fill up."""
    count = max(len(plan.segments) for plan in plans)
    nothing = np.zeros(plans[0].total, dtype=np.int64)
    padded = [[*plan.segments, *[None] * (count - len(plan.segments))] for plan in plans]
    return _stack([_stack([nothing if s is None else getattr(s, name) for s in own], 1) for own in padded], 0)
