"""What the rows of a static cache will attend until it is full, as tensors that a compiled step reads.

A compiled step cannot ask Python for a plan. So the eager forward before it (a prompt, or a new turn) builds tables of
everything that depends on lengths alone: which plan each future token uses, and the plan's key intervals and positions.
:func:`build_or_advance` does so when :class:`~posenc.hf.cache.state.CacheState` finishes a forward, and
``posenc/hf/compiled_step.py`` reads the tables. They hold positions rather than cos and sin, which would be 2 F times
larger. The step makes one cos/sin table of them for each kind of layer, however many segments and re-plans there are.

Shape letters: B batch, R rows (1 if all are alike), N plans, S segments, T cache slots, L new slots, F frequencies.
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
from posenc.hf.attachment import Attachment, Layers
from posenc.hf.cache.record import CacheRecord, Row, Spans, join_spans
from posenc.hf.model_frequencies import Base
from posenc.hf.stock import StockAttention
from posenc.plan import PositionPlan
from posenc.planning.planner import KEPT_PLANS, Planner
from posenc.planning.schedule import Schedule
from posenc.rope import Rotary
from posenc.segment import IntArray

logger = logging.getLogger("posenc")


@dataclass(frozen=True, eq=False)
class LayerKind:
    """One kind of attention layer, under every plan until the cache is full.

    Parameters
    ----------
    rotary : Rotary or None
        Frequencies of the first plan, in the layer's layout; None for a layer without rotary positions.
    stock : bool
        Whether the model's own attention with this rotary computes every plan.
    sliding_window : int or None
        The layer's own sliding window, in tokens.
    inv_freq_NF : float64 [N, F]
        Frequencies under every plan, in radians per token.
    factor_N : float64 [N]
        Factor on cos and sin under every plan.
    """

    rotary: Rotary | None
    stock: bool
    sliding_window: int | None
    inv_freq_NF: Tensor
    factor_N: Tensor


@dataclass(eq=False)
class StaticDecodeTables:
    """Everything that a compiled step needs, for every length until the cache is full.

    Parameters
    ----------
    fingerprint : str
        The strategy that the tables were built for.
    futures : tuple of Schedule
        Each row's schedule until the cache is full.
    built_at : int
        Slots that were filled when the tables were built.
    spans : tuple of Spans
        Each row's real slots among these.
    kinds : tuple of LayerKind
        Kinds of layers.
    kind_of : dict of int
        Index in ``kinds`` of every attention module.
    stock : callable
        The model's own attention function.
    count : int64 []
        Slots filled so far; a compiled step adds one.
    position_ids_BT : int64 [B, T]
        Position ids that were passed to the model; a compiled step adds its own.
    real_RT : bool [R, T]
        Which slots hold real tokens, decoded ones included.
    index_RT : int64 [R, T]
        Which of the row's real tokens each slot holds.
    plan_RT : int64 [R, T]
        Which plan the row's i-th real token uses.
    key_start_NTS, key_stop_NTS : int64 [N, T, S]
        Key intervals of query i.
    query_NTS, key_NTS : float64 [N, T, S] or [N, T, S, F]
        Rotary positions of query i and of key j.
    scale_NT : float64 [N, T] or None
        Factor on the logits of query i; None if it is 1 everywhere.
    """

    fingerprint: str
    futures: tuple[Schedule, ...]
    built_at: int
    spans: tuple[Spans, ...]
    kinds: tuple[LayerKind, ...]
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

    def __deepcopy__(self, memo: dict[int, object]) -> StaticDecodeTables:
        """A copy of the cache counts on its own; it shares the plans, which never change, and the model's modules."""
        return replace(self, count=self.count.clone(), position_ids_BT=self.position_ids_BT.clone())

    def __reduce__(self) -> tuple[type[NoDecodeTables], tuple[str]]:
        return NoDecodeTables, ("it was pickled, and the model is not part of it",)

    def expects(self, record: CacheRecord) -> bool:
        """Return whether the rows of a record have developed as these tables assume."""
        return (
            self.fingerprint == record.fingerprint
            and len(self.futures) == len(record.rows)
            and all(
                row.spans == join_spans(spans, ((self.built_at, record.slots),))
                and future.cropped(row.length) == row.schedule
                for row, future, spans in zip(record.rows, self.futures, self.spans, strict=True)
            )
        )

    def advance(self, record: CacheRecord) -> None:
        """Copy the tokens of a record, to which an eager step has added one."""
        self.position_ids_BT[:, : record.slots] = record.position_ids_BT
        self.count.fill_(record.slots)

    def absorb_decoded_tokens(self, record: CacheRecord, planner: Planner) -> CacheRecord:
        """Return the record with the tokens that compiled steps have decoded since."""
        slots = int(self.count)
        if self.fingerprint != record.fingerprint or slots <= record.slots:
            return record
        ids_BL = self.position_ids_BT[:, record.slots : slots]
        return record.extended(record.slots, ids_BL, None, planner, candidates=slots - record.slots)


@dataclass
class NoDecodeTables:
    """Stands in for the tables of a static cache whose compiled steps run the ordinary way, with graph breaks.

    Parameters
    ----------
    reason : str
        Why there are no tables.
    warned : bool
        Whether the reason was logged.
    """

    reason: str
    warned: bool = False

    def warn(self) -> None:
        """Log the reason, once per cache."""
        if not self.warned:
            logger.warning("torch.compile: every token of this cache breaks the graph, since %s.", self.reason)
            self.warned = True


DecodeTables = StaticDecodeTables | NoDecodeTables


def build_or_advance(
    tables: DecodeTables | None, cache: Any, record: CacheRecord, past: int, layers: Layers, *, compiling: bool
) -> DecodeTables | None:
    """Return the tables of a cache after a forward: advanced by one token, or built anew.

    Parameters
    ----------
    tables : StaticDecodeTables, NoDecodeTables or None
        The tables from before the forward.
    cache : Cache
        The KV cache.
    record : CacheRecord
        Its tokens, those of the forward included.
    past : int
        Slots that were filled before the forward.
    layers : Layers
        What the attention layers of the forward share.
    compiling : bool
        Whether torch.compile runs the forward.

    Returns
    -------
    StaticDecodeTables, NoDecodeTables or None
        None for a cache that is not static.
    """
    static = [layer for layer in getattr(cache, "layers", ()) if hasattr(layer, "max_cache_len")]
    if not static:
        return tables
    if past and record.slots == past + 1 and tables is not None:
        if isinstance(tables, NoDecodeTables):
            if compiling:
                tables.warn()
            return tables
        if record.slots <= tables.position_ids_BT.shape[1] and tables.expects(record):
            tables.advance(record)
            return tables
    slots = max((layer.max_cache_len for layer in static if not layer.is_sliding), default=0)
    return _build(record, slots, layers)


def _build(record: CacheRecord, slots: int, layers: Layers) -> DecodeTables:
    attachment, decoder, bases = layers.attachment, layers.decoder, layers.bases
    planner, free = attachment.planner, slots - record.slots
    if slots == 0:
        return NoDecodeTables("all its layers slide, so there is no length at which it is full")
    if any(not row.spans for row in record.rows):
        return NoDecodeTables("a row holds only padding")
    if any(_follows_the_length(decoder, facts.source) for facts in bases):
        return NoDecodeTables("the model's own frequencies follow the length")
    if planner.by_layer:
        return NoDecodeTables("its layers see different positions")
    schedules = [planner.future(row.schedule, row.length, row.length + free) for row in record.rows]
    futures = tuple(future for future in schedules if future is not None)
    if len(futures) < len(schedules):
        return NoDecodeTables(f"its rows re-plan, or try to, more than {KEPT_PLANS} times before the cache is full")
    prompts = [_prompts(row, future, slots) for row, future in zip(record.rows, futures, strict=True)]
    distinct = sorted({int(prompt) for prompts_T in prompts for prompt in prompts_T})
    if len(distinct) > KEPT_PLANS:
        return NoDecodeTables(f"its rows use more than {KEPT_PLANS} plans before the cache is full")
    plans = [planner.plan(prompt, slots) for prompt in distinct]
    if any(plan.interpolates_logits for plan in plans):
        return NoDecodeTables("the strategy interpolates logits")
    device = record.position_ids_BT.device
    facts = list(dict.fromkeys(attachment.facts.values()))
    kinds = tuple(_kind(kind, bases.get(kind), plans, attachment) for kind in facts)
    if not all(kind.stock for kind in kinds) and not all(row.consecutive for row in record.rows):
        return NoDecodeTables("position ids do not count up by one")
    rows = record.rows[:1] if all(row == record.rows[0] for row in record.rows) else record.rows
    real_RT = np.stack([_real(row, record.slots, slots) for row in rows])
    position_ids_BT = torch.zeros((len(record.rows), slots), dtype=torch.long, device=device)
    position_ids_BT[:, : record.slots] = record.position_ids_BT
    scaled = any(plan.query_scale is not None for plan in plans)
    scales = [np.ones(slots) if plan.query_scale is None else plan.query_scale for plan in plans]

    def on_device(x: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    return StaticDecodeTables(
        record.fingerprint,
        futures,
        record.slots,
        tuple(row.spans for row in record.rows),
        kinds,
        {module: facts.index(kind) for module, kind in attachment.facts.items()},
        layers.stock,
        torch.tensor(record.slots, device=device),
        position_ids_BT,
        on_device(real_RT),
        on_device(np.maximum(real_RT.cumsum(1) - 1, 0)),
        on_device(np.searchsorted(distinct, prompts[: len(rows)])),
        on_device(_segments(plans, "key_start")),
        on_device(_segments(plans, "key_stop")),
        on_device(_segments(plans, "query_positions").astype(np.float64)),
        on_device(_segments(plans, "key_positions").astype(np.float64)),
        on_device(np.stack(scales)) if scaled else None,
    )


def _follows_the_length(decoder: nn.Module, source: RotarySource | None) -> bool:
    return source is not None and rope_type(decoder.get_submodule(source.module), source) in LENGTH_DEPENDENT


def _prompts(row: Row, future: Schedule, slots: int) -> IntArray:
    """Return the prompt length of the plan that the row's i-th real token uses, int64 [T]."""
    prompts_T = np.full(slots, future.prompt_at(row.length), dtype=np.int64)
    for start, prompt in future.entries:
        if start > row.length:
            prompts_T[start - 1 :] = prompt
    return prompts_T


def _real(row: Row, filled: int, slots: int) -> NDArray[np.bool_]:
    """Return which slots hold real tokens or will hold them, as every decoded token is real, bool [T]."""
    real_T = np.zeros(slots, dtype=bool)
    for start, stop in row.spans:
        real_T[start:stop] = True
    real_T[filled:] = True
    return real_T


def _kind(facts: LayerFacts, base: Base | None, plans: Sequence[PositionPlan], attachment: Attachment) -> LayerKind:
    if base is None:
        return LayerKind(None, True, facts.sliding_window, torch.empty(0), torch.empty(0))
    rotaries = [attachment.planner.rotary(base.stock, plan.prompt) for plan in plans]
    window = facts.sliding_window
    stock = all((plan if window is None else plan.clipped(window)).is_stock(window) for plan in plans)
    return LayerKind(
        rotaries[0],
        stock and len(set(rotaries)) == 1,
        window,
        torch.stack([rotary.inv_freq.double() for rotary in rotaries]),
        torch.tensor([rotary.attention_scaling for rotary in rotaries], dtype=torch.float64),
    )


def _stack(arrays: Sequence[NDArray[Any]], axis: int) -> NDArray[Any]:
    """Stack arrays, some of which may have one more dimension for positions that differ by frequency."""
    rank = max(array.ndim for array in arrays)
    aligned = [array if array.ndim == rank else array[..., None] for array in arrays]
    return np.stack(np.broadcast_arrays(*aligned), axis)


def _segments(plans: Sequence[PositionPlan], name: str) -> NDArray[Any]:
    """Stack one attribute of every segment of every plan, [N, T, S] or [N, T, S, F], padded with empty segments."""
    count = max(len(plan.segments) for plan in plans)
    empty_T = np.zeros(plans[0].total, dtype=np.int64)
    padded = [[*plan.segments, *[None] * (count - len(plan.segments))] for plan in plans]
    return _stack([_stack([empty_T if s is None else getattr(s, name) for s in segments], 1) for segments in padded], 0)
