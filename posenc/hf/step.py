"""One forward of a patched model: group the rows by plan, and compute their attention in every layer.

The decoder's hook makes a :class:`Step` once it has accounted for the tokens in the cache, and the registered attention
function calls :meth:`Step.attend` in every layer. Layers of one kind share what the step works out. A layer whose plan
is the identity runs the model's own attention; any other layer runs a backend (``posenc/kernels/dispatch.py``).

Shape letters: B batch, R rows of a group, H heads, L new tokens, C tokens of a group, K cache slots handed to a layer,
T slots so far, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from posenc.backend import AttentionBackend, needs_gradient
from posenc.errors import BackendError, CacheMismatchError, InvalidInputError, UnsupportedModelError
from posenc.hf.attachment import Layers
from posenc.hf.cache.padding import mask_fault
from posenc.hf.cache.record import cut_spans, span_count
from posenc.hf.cache.state import CachedTokens
from posenc.hf.layer_call import LayerCall
from posenc.hf.model_frequencies import Base
from posenc.hf.row_groups import GroupWork, QueryRun, RowGroup, gather, grouped, scatter, tokens
from posenc.kernels.autocast import as_autocast
from posenc.kernels.choice import AttentionCase
from posenc.kernels.dispatch import attend, checked_backend
from posenc.plan import PositionPlan
from posenc.planning.planner import Planner
from posenc.rope import Rotary
from posenc.trace import tracing


@dataclass
class Step:
    """Everything that the attention layers of one forward need; travels to them as a keyword argument.

    Parameters
    ----------
    tokens : CachedTokens
        The tokens in the cache and those of this forward.
    layers : Layers
        What the attention layers share.
    static : bool
        Whether the cache is static, so that it also hands over slots that are not filled yet.
    attentions : bool
        Whether the caller asks for attention weights.
    causal : bool
        False if the model's configuration asks for attention in both directions.
    table_dtype : torch.dtype, optional
        Dtype of the model's own cos and sin, which in mixed precision is not that of queries and keys.
    """

    tokens: CachedTokens
    layers: Layers
    static: bool = field(default=False, kw_only=True)
    attentions: bool = field(default=False, kw_only=True)
    causal: bool = field(default=True, kw_only=True)
    table_dtype: torch.dtype | None = field(default=None, kw_only=True)
    _plans: dict[tuple[Planner, int, int, int, int], PositionPlan] = field(default_factory=dict)
    _works: dict[tuple[Planner, Base, int | None, int], Rotary | list[GroupWork]] = field(default_factory=dict)
    _masks: list[tuple[Tensor, int | None, int]] = field(default_factory=list)
    _backends: dict[tuple[Any, ...], AttentionBackend] = field(default_factory=dict)
    _traced: bool = field(default_factory=tracing)

    @cached_property
    def groups(self) -> list[RowGroup]:
        """Rows grouped by padding and plans; rows of padding only are left out."""
        return grouped(self.tokens.record.rows, self.tokens.past)

    def attend(self, call: LayerCall) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, L, H, D] of a layer's attention, and weights if the model's own function makes some.

        Raises
        ------
        UnsupportedModelError
            If the layer was not probed.
        CacheMismatchError
            If its cache does not hold the keys of the recorded tokens.
        BackendError, InvalidInputError
            If the call asks for something that a remapped layer does not compute.
        """
        facts = self.layers.facts.get(call.module)
        if facts is None:
            raise UnsupportedModelError(
                f"{type(call.module).__name__} attends in this forward, but did not when posenc was applied: it was "
                "not probed. Apply posenc to a model whose plain text forward runs every attention layer."
            )
        base = self.layers.bases.get(facts)
        if base is None:  # no rotary positions: nothing to remap
            return call.run(self.layers.stock, call.q_BHLD, call.k_BHKD)
        keys = call.k_BHKD.shape[2]
        offset = max(0, self.tokens.record.slots - keys)  # a sliding cache hands over its last slots only
        self._check_keys(call.module, keys, facts.sliding_window)
        work = self._work(self.layers.planners[call.module], base, facts.sliding_window, offset)
        if isinstance(work, Rotary):
            return self._stock(call, work, offset)
        refuse_options(call.dropout, call.options, attentions=self.attentions)
        self._check_mask(call, facts.sliding_window, offset)
        return self._remapped(call, work, offset), None

    def _remapped(self, call: LayerCall, work: list[GroupWork], offset: int) -> Tensor:
        """Compute the attention of every group, [B, L, H, D]; rows without new real tokens are 0."""
        q_BHLD, k_BHKD, v_BHKD = as_autocast(call.q_BHLD, call.k_BHKD, call.v_BHKD)
        index = self._kept_index(call.module, offset)
        out_BHLD: Tensor | None = None
        for entry in work:
            part_RHCD = self._group_attention(call, q_BHLD, k_BHKD, v_BHKD, entry, index)
            group = entry.group
            if len(group.rows) == q_BHLD.shape[0] and part_RHCD.shape[2] == q_BHLD.shape[2]:
                out_BHLD = part_RHCD
                continue
            if out_BHLD is None:
                shape = (q_BHLD.shape[0], q_BHLD.shape[2], q_BHLD.shape[1], v_BHKD.shape[-1])
                out_BHLD = q_BHLD.new_zeros(shape).transpose(1, 2)
            scatter(out_BHLD, part_RHCD, group.rows, entry.new)
        assert out_BHLD is not None
        if self.tokens.rotated is not None and index is not None:
            self.tokens.rotated.saw(index, call.k_BHKD, self.tokens.record.slots)
        return out_BHLD.transpose(1, 2).contiguous()

    def _kept_index(self, module: nn.Module, offset: int) -> int | None:
        """Return the index of a layer whose rotated keys are kept for the next step, or None."""
        index: int | None = getattr(module, "layer_idx", None) if offset == 0 else None
        rotated = self.tokens.rotated
        return index if rotated is not None and index is not None and rotated.serves(index) else None

    def _group_attention(
        self, call: LayerCall, q_BHLD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, entry: GroupWork, index: int | None
    ) -> Tensor:
        """Compute the attention of the new tokens of one group, [R, H, C, D]."""
        group, rotated = entry.group, self.tokens.rotated
        softcap, sinks = call.options.get("softcap"), call.options.get("s_aux")
        q = gather(group.select(q_BHLD), entry.new)
        k, v = gather(group.select(k_BHKD), entry.keys), gather(group.select(v_BHKD), entry.keys)
        kept = None
        if rotated is not None and index is not None and len(entry.keys) == len(entry.runs) == 1:
            kept = rotated.of(index, group.rows, padding=entry.keys[0][0])
        outs = []
        for run in entry.runs:
            case = (tokens(q, run.low, run.high), tokens(k, 0, run.keys), tokens(v, 0, run.keys))
            backend = self._backend(*case, run.plan, softcap, sinks)
            out, _ = attend(
                backend, *case, run.plan, run.rotary, call.scale, None, softcap=softcap, sinks=sinks, kept=kept
            )
            outs.append(out)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)

    def _backend(
        self, q: Tensor, k: Tensor, v: Tensor, plan: PositionPlan, softcap: float | None, sinks: Tensor | None
    ) -> AttentionBackend:
        """Choose the backend of a call: once for layers with similar tensors, but every time if choices are traced."""
        kind = (q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device)
        options = (softcap is None, sinks is None, needs_gradient(q, k, v), sinks is not None and needs_gradient(sinks))
        key = (plan, kind, options)
        if key not in self._backends or self._traced:
            case = AttentionCase(q, k, v, None, [plan], softcap, sinks)
            self._backends[key] = checked_backend(self.layers.backend, case)
        return self._backends[key]

    def _check_keys(self, module: nn.Module, keys: int, sliding_window: int | None) -> None:
        """Check that a layer holds the keys of all recorded tokens, or at least those inside its sliding window."""
        total, past = self.tokens.record.slots, self.tokens.past
        least = total if sliding_window is None else min(total, sliding_window - 1 + total - past)
        if keys < least or (keys > total and not self.static):
            raise CacheMismatchError(
                f"{type(module).__name__} {getattr(module, 'layer_idx', '')} holds {keys} keys, but posenc recorded "
                f"{total} tokens: keys were dropped from this layer, or a forward broke off between the layers. "
                "Start from an empty cache."
            )

    def _check_mask(self, call: LayerCall, sliding_window: int | None, offset: int) -> None:
        """Refuse a mask that does more than plans, which are causal and know padding and sliding windows."""
        module, mask, record, past = call.module, call.mask, self.tokens.record, self.tokens.past
        causal = call.options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        if not self.causal or (not causal and mask is None and record.slots - past > 1):
            raise BackendError(
                "attention in both directions (is_causal=False) is not available under a remapped plan, which is "
                "causal. Call handle.remove() for it."
            )
        if mask is None or record.dropped:  # masks are made for the whole text, a bounded cache holds a part of it
            return
        if any(checked[0] is mask and checked[1:] == (sliding_window, offset) for checked in self._masks):
            return
        fault = mask_fault(mask, record, past, offset, sliding_window)
        if fault is not None:
            raise InvalidInputError(
                f"the 4-D attention mask of {type(module).__name__} {getattr(module, 'layer_idx', '')} cannot be "
                f"combined with a remapped plan: {fault}. Only causal attention with padding can be remapped: pass the "
                "2-D padding mask and text alone, one sequence per row."
            )
        self._masks.append((mask, sliding_window, offset))

    def _work(self, planner: Planner, base: Base, sliding_window: int | None, offset: int) -> Rotary | list[GroupWork]:
        """Return what the layers of one kind compute: the groups' work, or the rotary for the model's own attention."""
        key = (planner, base, sliding_window, offset)
        if key not in self._works:
            rotaries = {self._stock_rotary(group, sliding_window, base, planner) for group in self.groups}
            if not self.groups:  # all new tokens are padding, and nobody reads their outputs
                rotaries = {base.stock}
            stock = rotaries.pop() if len(rotaries) == 1 else None
            if stock is None:
                self._works[key] = [self._of_group(g, planner, base, sliding_window, offset) for g in self.groups]
            else:
                self._works[key] = stock
        return self._works[key]

    def _of_group(
        self, group: RowGroup, planner: Planner, base: Base, sliding_window: int | None, offset: int
    ) -> GroupWork:
        total, skipped = self.tokens.record.slots, span_count(group.spans, below=offset)
        runs = tuple(
            QueryRun(
                low - group.before,
                high - group.before,
                high - skipped,
                self._plan(planner, prompt, high, sliding_window, skipped),
                planner.rotary(frequencies, prompt),
            )
            for first, stop, prompt in group.runs
            for low, high, frequencies in base.runs(first, stop, prompt)
        )
        new, keys = cut_spans(group.spans, self.tokens.past, total), cut_spans(group.spans, offset, total)
        return GroupWork(group, new, keys, runs)

    def _plan(
        self, planner: Planner, prompt: int, total: int, sliding_window: int | None, skipped: int
    ) -> PositionPlan:
        """Return the plan of a layer, clipped to its sliding window and without the keys that its cache has dropped."""
        key = (planner, prompt, total, sliding_window or 0, skipped)
        if key not in self._plans:
            plan = planner.plan(prompt, total)
            if sliding_window is not None:
                plan = plan.clipped(sliding_window)
            self._plans[key] = plan.suffix(skipped)
        return self._plans[key]

    def _stock_rotary(self, group: RowGroup, sliding_window: int | None, base: Base, planner: Planner) -> Rotary | None:
        """Return the rotary with which the model's own attention computes this group exactly, or None."""
        if len(group.runs) != 1:
            return None
        low, high, prompt = group.runs[0]
        plan = self._plan(planner, prompt, high, sliding_window, 0)
        # a bounded cache has dropped keys that the model's own mask still counts
        if plan.is_stock(sliding_window) and not self.tokens.record.dropped:
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

    def _stock(self, call: LayerCall, rotary: Rotary, offset: int) -> tuple[Tensor, Tensor | None]:
        """Run the model's own attention on its own rotation, bit-equal to the unpatched model."""
        q_BHLD, k_BHKD = call.q_BHLD, call.k_BHKD
        ids_BT = self.tokens.record.position_ids_BT.to(q_BHLD.device)
        key_ids_BK = ids_BT[:, offset:]
        unfilled = k_BHKD.shape[2] - key_ids_BK.shape[1]
        if unfilled > 0:
            key_ids_BK = torch.cat((key_ids_BK, key_ids_BK.new_zeros((key_ids_BK.shape[0], unfilled))), dim=1)
        return call.run(
            self.layers.stock,
            self._wide(rotary, q_BHLD).rotate_as_stock(q_BHLD, ids_BT[:, self.tokens.past :]),
            self._wide(rotary, k_BHKD).rotate_as_stock(k_BHKD, key_ids_BK),
        )

    def _wide(self, rotary: Rotary, x: Tensor) -> Rotary:
        """Return the rotary for a tensor, with wide tables if the model's own are wider than it (mixed precision)."""
        wider = self.table_dtype is not None and self.table_dtype.itemsize > x.dtype.itemsize
        return rotary.with_wide_tables() if wider else rotary


def refuse_options(dropout: float, options: Mapping[str, Any], *, attentions: bool = False) -> None:
    """Refuse options of a call that no remapped layer computes.

    Parameters
    ----------
    dropout : float
        Probability of attention dropout.
    options : mapping
        Options of the call to the attention function.
    attentions : bool
        Whether the forward asks for attention weights.

    Raises
    ------
    BackendError
        If dropout, attention weights or a position bias is asked for.
    """
    if dropout:
        raise BackendError(
            f"attention dropout ({dropout}) is not available under a remapped plan: set the model's "
            "attention_dropout to 0, or call model.eval()."
        )
    if attentions or options.get("output_attentions"):
        raise BackendError(
            "output_attentions=True is not available under a remapped plan: the weights are never computed. "
            "Call the model without it."
        )
    if options.get("position_bias") is not None:
        raise BackendError(
            "this model's attention adds a position_bias, which remapped attention does not compute. "
            "Call handle.remove() for it."
        )
