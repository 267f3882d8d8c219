"""One forward of a patched model: which rows share a plan, and their attention in every layer.

Shape letters: B batch, H heads, L new tokens, K cache slots handed to a layer, T slots so far, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from posenc.adapter import LayerFacts
from posenc.backend import AttentionBackend, needs_gradient
from posenc.errors import BackendError, CacheMismatchError, InvalidInputError, UnsupportedModelError
from posenc.hf.cache.record import CacheRecord, Spans, cut_spans, span_count
from posenc.hf.cache.rotated_keys import KeptLayers
from posenc.hf.own_frequencies import Base
from posenc.hf.padding import mask_fault
from posenc.hf.stock import StockAttention
from posenc.kernels.autocast import as_autocast
from posenc.kernels.dispatch import attend, checked_backend
from posenc.plan import PositionPlan
from posenc.planning.planner import Planner
from posenc.rope import Rotary
from posenc.trace import tracing


@dataclass(frozen=True)
class Group:
    """Rows with the same layout of real tokens and the same plans."""

    rows: tuple[int, ...]
    spans: Spans
    before: int
    pieces: tuple[tuple[int, int, int], ...]
    consecutive: bool

    def select(self, x: Tensor) -> Tensor:
        """The group's rows of a batched tensor; neighbouring rows are a view."""
        if len(self.rows) == len(x):  # the rows of a group are in order
            return x
        first, last = self.rows[0], self.rows[-1]
        if last - first + 1 == len(self.rows):
            return x[first : last + 1]
        return x[list(self.rows)]


@dataclass(frozen=True)
class Part:
    """New tokens ``low .. high - 1`` of a group that share a plan, and how many keys they see."""

    low: int
    high: int
    keys: int
    plan: PositionPlan
    rotary: Rotary


@dataclass(frozen=True)
class Share:
    """What a group asks of the layers of one kind: slots of its new tokens and of its keys, and the plans."""

    group: Group
    new: Spans
    keys: Spans
    parts: tuple[Part, ...]


@dataclass
class Step:
    """Everything the attention layers of one forward need; travels to them as a keyword argument.

    Parameters
    ----------
    record : CacheRecord
        The cache's state after this forward.
    past : int
        Slots in the cache before it.
    facts : dict of LayerFacts
        What the probe measured on every attention module.
    planners : dict of Planner
        Makes the plans of every attention module.
    bases : dict of Rotary
        The model's own frequencies, in the layout of each kind of layer.
    backend : str
        Backend name or ``"auto"``.
    stock : callable
        The model's own attention function, for identity plans.
    kept : KeptLayers, optional
        Rotated keys of earlier decoding steps.
    leaves : CacheRecord
        The state that the forward leaves on its cache; a bounded cache drops slots.
    static : bool
        Whether the cache hands over slots that are not filled yet.
    attentions : bool
        Whether the forward was asked for attention weights.
    causal : bool
        False where the model's configuration asks for attention in both directions.
    table_dtype : torch.dtype, optional
        Of the model's own cos and sin; in mixed precision not that of queries and keys.
    """

    record: CacheRecord
    past: int
    facts: Mapping[torch.nn.Module, LayerFacts]
    planners: Mapping[torch.nn.Module, Planner]
    bases: Mapping[LayerFacts, Base]
    backend: str
    stock: StockAttention
    kept: KeptLayers | None = None
    leaves: CacheRecord = field(kw_only=True)
    static: bool = field(default=False, kw_only=True)
    attentions: bool = field(default=False, kw_only=True)
    causal: bool = field(default=True, kw_only=True)
    table_dtype: torch.dtype | None = field(default=None, kw_only=True)
    _plans: dict[tuple[Planner, int, int, int, int], PositionPlan] = field(default_factory=dict)
    _groups: list[Group] | None = None
    _kinds: dict[tuple[Planner, Base, int | None, int], Rotary | list[Share]] = field(default_factory=dict)
    _masks: list[tuple[Tensor, int | None, int]] = field(default_factory=list)
    _backends: dict[tuple[Any, ...], AttentionBackend] = field(default_factory=dict)
    _traced: bool = field(default_factory=tracing)

    @property
    def groups(self) -> list[Group]:
        """Rows grouped by layout and plans; rows of padding only are left out."""
        if self._groups is None:
            found: dict[tuple[Any, ...], list[int]] = {}
            for index, row in enumerate(self.record.rows):
                before = span_count(row.spans, below=self.past)
                if row.length > before:
                    pieces = row.schedule.pieces(before, row.length)
                    found.setdefault((row.spans, before, pieces, row.consecutive), []).append(index)
            self._groups = [Group(tuple(rows), *key) for key, rows in found.items()]
        return self._groups

    def attend(
        self,
        module: torch.nn.Module,
        q_BHLD: Tensor,
        k_BHKD: Tensor,
        v_BHKD: Tensor,
        mask: Tensor | None,
        *,
        scaling: float | None,
        dropout: float,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of one layer on raw queries and keys; output [B, L, H, D] as transformers expects."""
        facts = self.facts.get(module)
        if facts is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends in this forward, but did not when posenc was applied: it was not "
                "probed. Apply posenc to a model whose plain text forward runs every attention layer."
            )
        base = self.bases.get(facts)
        if base is None:  # no rotary positions: nothing to remap
            return self.stock(module, q_BHLD, k_BHKD, v_BHKD, mask, dropout=dropout, scaling=scaling, **options)
        total = self.record.slots
        offset = max(0, total - k_BHKD.shape[2])  # a sliding cache hands over its last slots only
        self._check_keys(module, k_BHKD.shape[2], facts.window)
        prepared = self._prepared(self.planners[module], base, facts.window, offset)
        if isinstance(prepared, Rotary):
            return self._stock(
                module,
                q_BHLD,
                k_BHKD,
                v_BHKD,
                mask,
                prepared,
                offset,
                scaling=scaling,
                dropout=dropout,
                options=options,
            )
        self.refuse(dropout, options)
        self._check_mask(module, mask, facts.window, offset, options)
        cached_BHKD = k_BHKD
        q_BHLD, k_BHKD, v_BHKD = as_autocast(q_BHLD, k_BHKD, v_BHKD)
        scale = q_BHLD.shape[-1] ** -0.5 if scaling is None else scaling
        softcap, sinks = options.get("softcap"), options.get("s_aux")
        index: int | None = getattr(module, "layer_idx", None) if offset == 0 else None
        if self.kept is not None and index is not None and not self.kept.serves(index):
            index = None
        out_BHLD: Tensor | None = None
        for share in prepared:
            group = share.group
            q = _gather(group.select(q_BHLD), share.new)
            k, v = _gather(group.select(k_BHKD), share.keys), _gather(group.select(v_BHKD), share.keys)
            kept = None
            if self.kept is not None and index is not None and len(share.keys) == len(share.parts) == 1:
                kept = self.kept.of(index, group.rows, padding=share.keys[0][0])
            outs = []
            for part in share.parts:
                case = (_tokens(q, part.low, part.high), _tokens(k, 0, part.keys), _tokens(v, 0, part.keys))
                backend = self._backend(*case, part.plan, softcap, sinks)
                out, _ = attend(
                    backend, *case, part.plan, part.rotary, scale, None, softcap=softcap, sinks=sinks, kept=kept
                )
                outs.append(out)
            out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
            if len(group.rows) == q_BHLD.shape[0] and out.shape[2] == q_BHLD.shape[2]:
                out_BHLD = out
                continue
            if out_BHLD is None:
                shape = (q_BHLD.shape[0], q_BHLD.shape[2], q_BHLD.shape[1], v_BHKD.shape[-1])
                out_BHLD = q_BHLD.new_zeros(shape).transpose(1, 2)
            _scatter(out_BHLD, out, group.rows, share.new)
        assert out_BHLD is not None
        if self.kept is not None and index is not None:
            self.kept.saw(index, cached_BHKD, total)
        return out_BHLD.transpose(1, 2).contiguous(), None

    def _backend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: PositionPlan, softcap: float | None, sinks: Tensor | None
    ) -> AttentionBackend:
        """The backend of a case: chosen once for layers whose tensors are alike, unless every choice is to be shown."""
        kind = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
        extras = (softcap is None, sinks is None, needs_gradient(q, k, v), sinks is not None and needs_gradient(sinks))
        key = (plan, kind, extras)
        if key not in self._backends or self._traced:
            self._backends[key] = checked_backend(q, k, v, None, self.backend, [plan], softcap=softcap, sinks=sinks)
        return self._backends[key]

    def _check_keys(self, module: torch.nn.Module, keys: int, window: int | None) -> None:
        """Every layer must hold the keys that were accounted for: a sliding one may have dropped those out of reach."""
        total = self.record.slots
        least = total if window is None else min(total, window - 1 + total - self.past)
        if keys < least or (keys > total and not self.static):
            raise CacheMismatchError(
                f"{type(module).__name__} {getattr(module, 'layer_idx', '')} holds {keys} keys, and {total} tokens "
                "were accounted for: keys were dropped from this layer, or a forward broke off between the layers. "
                "Start from an empty cache."
            )

    def _check_mask(
        self, module: torch.nn.Module, mask: Tensor | None, window: int | None, offset: int, options: dict[str, Any]
    ) -> None:
        """Plans are causal and know padding and the layer's window: a mask that says more is refused, not ignored."""
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        new = self.record.slots - self.past
        if not self.causal or (not causal and mask is None and new > 1):
            raise BackendError(
                "attention in both directions (is_causal=False) is not available under a remapped plan, which is "
                "causal. Call handle.remove() for it."
            )
        if mask is None or self.record.dropped:  # it was made of the text, of which a bounded cache holds a part
            return
        if any(case[0] is mask and case[1:] == (window, offset) for case in self._masks):
            return
        fault = mask_fault(mask, self.record, self.past, offset, window)
        if fault is not None:
            raise InvalidInputError(
                f"the 4-D attention mask of {type(module).__name__} {getattr(module, 'layer_idx', '')} cannot be "
                f"combined with a remapped plan: {fault}. Only causal attention with padding can be remapped: pass the "
                "2-D padding mask and text alone, one sequence per row."
            )
        self._masks.append((mask, window, offset))

    def _prepared(self, planner: Planner, base: Base, window: int | None, offset: int) -> Rotary | list[Share]:
        """What every layer of one kind computes: the shares of the groups, or the model's own attention on a rotary."""
        key = (planner, base, window, offset)
        if key not in self._kinds:
            rotaries = {self._stock_rotary(group, window, base, planner) for group in self.groups}
            if not self.groups:  # padding only: whatever it attends, nobody reads
                rotaries = {base.stock}
            stock = rotaries.pop() if len(rotaries) == 1 else None
            if stock is None:
                self._kinds[key] = [self._share(group, planner, base, window, offset) for group in self.groups]
            else:
                self._kinds[key] = stock
        return self._kinds[key]

    def _share(self, group: Group, planner: Planner, base: Base, window: int | None, offset: int) -> Share:
        total, skipped = self.record.slots, span_count(group.spans, below=offset)
        parts = tuple(
            Part(
                low - group.before,
                high - group.before,
                high - skipped,
                self._plan(planner, prompt, high, window, skipped),
                planner.rotary(own, prompt),
            )
            for first, stop, prompt in group.pieces
            for low, high, own in base.runs(first, stop, prompt)
        )
        return Share(group, cut_spans(group.spans, self.past, total), cut_spans(group.spans, offset, total), parts)

    def _plan(self, planner: Planner, prompt: int, total: int, window: int | None, skipped: int) -> PositionPlan:
        """The plan of a layer: clipped to its sliding window, without keys its cache dropped."""
        key = (planner, prompt, total, window or 0, skipped)
        if key not in self._plans:
            plan = planner.plan(prompt, total)
            if window is not None:
                plan = plan.clipped(window)
            self._plans[key] = plan.suffix(skipped)
        return self._plans[key]

    def _stock_rotary(self, group: Group, window: int | None, base: Base, planner: Planner) -> Rotary | None:
        """The rotary with which the model's own attention computes this group exactly, or None."""
        if len(group.pieces) != 1:
            return None
        low, high, prompt = group.pieces[0]
        plan = self._plan(planner, prompt, high, window, 0)
        if plan.is_stock(window) and not self.record.dropped:  # else the model's mask does not know which keys are left
            if not planner.strategy.capabilities.changes_frequencies:
                return base.stock
            runs = base.runs(low, high, prompt)
            return planner.rotary(runs[0][2], prompt) if len(runs) == 1 else None
        if not group.consecutive:
            raise InvalidInputError(
                "position_ids must count up by one inside every row: packed sequences and gaps cannot be remapped. "
                "Pass one sequence per batch row."
            )
        return None

    def _stock(
        self,
        module: torch.nn.Module,
        q_BHLD: Tensor,
        k_BHKD: Tensor,
        v_BHKD: Tensor,
        mask: Tensor | None,
        rotary: Rotary,
        offset: int,
        *,
        scaling: float | None,
        dropout: float,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention on its own rotation: bit-equal to the unpatched model."""
        ids_BT = self.record.position_ids_BT.to(q_BHLD.device)
        key_ids = ids_BT[:, offset:]
        empty = k_BHKD.shape[2] - key_ids.shape[1]
        if empty > 0:
            key_ids = torch.cat((key_ids, key_ids.new_zeros((key_ids.shape[0], empty))), dim=1)
        q = self._wide(rotary, q_BHLD).rotate_as_stock(q_BHLD, ids_BT[:, self.past :])
        k = self._wide(rotary, k_BHKD).rotate_as_stock(k_BHKD, key_ids)
        return self.stock(module, q, k, v_BHKD, mask, dropout=dropout, scaling=scaling, **options)

    def _wide(self, rotary: Rotary, x: Tensor) -> Rotary:
        """How the model rotates a tensor that is narrower than its tables, as some are in mixed precision."""
        wider = self.table_dtype is not None and self.table_dtype.itemsize > x.dtype.itemsize
        return rotary.with_wide_tables() if wider else rotary

    def refuse(self, dropout: float, options: dict[str, Any]) -> None:
        """Raise for what a remapped layer does not compute."""
        refuse_options(dropout, {**options, "output_attentions": self.attentions or options.get("output_attentions")})


def refuse_options(dropout: float, options: dict[str, Any]) -> None:
    """Raise for what no remapped layer computes."""
    if dropout:
        raise BackendError(
            f"attention dropout ({dropout}) is not available under a remapped plan: set the model's "
            "attention_dropout to 0, or call model.eval()."
        )
    if options.get("output_attentions"):
        raise BackendError(
            "output_attentions=True is not available under a remapped plan: the weights are never formed. "
            "Call the model without it."
        )
    if options.get("position_bias") is not None:
        raise BackendError("this model's attention adds a position_bias, which remapped attention does not compute.")


def _tokens(x_BHLD: Tensor, start: int, stop: int) -> Tensor:
    return x_BHLD if stop - start == x_BHLD.shape[2] else x_BHLD[:, :, start:stop]


def _gather(x_BHLD: Tensor, spans: Spans) -> Tensor:
    """The tokens of the spans; one span is a view."""
    if len(spans) == 1:
        return _tokens(x_BHLD, *spans[0])
    return torch.cat([x_BHLD[:, :, start:stop] for start, stop in spans], dim=2)


def _scatter(out_BHLD: Tensor, part_RHCD: Tensor, rows: tuple[int, ...], spans: Spans) -> None:
    """Put a group's outputs at its rows and new tokens."""
    done = 0
    for start, stop in spans:
        for number, row in enumerate(rows):
            out_BHLD[row, :, start:stop] = part_RHCD[number, :, done : done + stop - start]
        done += stop - start
