"""Read attention masks: which tokens are padding, and whether a mask asks for more than plans compute.

:func:`read_padding` reads the mask of a forward before its plans are made. :func:`mask_fault` checks the masks that
reach the layers of a remapped forward.

Shape letters: B batch, H heads, L new tokens, K keys of the mask, P slots before the forward, T slots after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posenc.errors import InvalidInputError
from posenc.hf.cache.record import CacheRecord, cut_spans

BLOCKED = -1e4
"""Values up to this one, added to a logit, hide the key: their ``exp`` is 0 in every dtype."""

PAIRS = 2**24
"""How many query-key pairs of a mask are compared at a time, at most."""


def real_slots(record: CacheRecord, slots: int, device: torch.device) -> Tensor:
    """Return which of the first ``slots`` slots hold real tokens, bool [B, T]."""
    real_BT = torch.zeros((len(record.rows), slots), dtype=torch.bool)
    for index, row in enumerate(record.rows):
        for start, stop in cut_spans(row.spans, 0, slots):
            real_BT[index, start:stop] = True
    return real_BT.to(device)


def read_padding(
    mask: Any, past: int, batch: int, new: int, record: CacheRecord, sliding_window: int | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Read from the mask of a forward which new slots are real, and which earlier slots it shows.

    Parameters
    ----------
    mask : Tensor, dict of Tensor or None
        2-D padding mask, 4-D mask (bool, or added to the logits), or one 4-D mask for each type of layer.
    past, batch, new : int
        Slots before the forward, rows, and new slots.
    record : CacheRecord
        The tokens before the forward.
    sliding_window : int, optional
        How many tokens a 4-D mask reaches back, if every layer has a sliding window.

    Returns
    -------
    real_BL : bool [B, L] or None
        Which new slots hold real tokens; None if all do.
    shown_BP : bool [B, P] or None
        Which earlier slots are shown; None if they are those of the record.

    Raises
    ------
    InvalidInputError
        If the mask has the wrong shape, or shows a slot that was padding when the cache was filled.
    """
    if isinstance(mask, dict):
        masks = [layer_mask for layer_mask in mask.values() if layer_mask is not None]
        full = mask.get("full_attention")
        mask, sliding_window = (full, None) if full is not None else (masks[0] if masks else None, sliding_window)
    if mask is None:
        return None, None
    if mask.ndim == 4:
        if record.dropped:
            raise InvalidInputError(
                "a 4-D attention mask cannot say which keys of a bounded cache it means. Pass the 2-D padding mask."
            )
        real_BL, shown_BP, covered_BP = _from_square(mask, past, batch, new, sliding_window)
    elif mask.ndim == 2 and mask.shape[0] == batch:
        shown_BT = mask.bool()
        if shown_BT.shape[1] < past + new:
            raise InvalidInputError(
                f"attention_mask covers {shown_BT.shape[1]} tokens, but the cache holds {past} and {new} are new. Pass "
                "the mask of all tokens so far."
            )
        real_BL, shown_BP = shown_BT[:, past : past + new], shown_BT[:, :past]
        covered_BP = torch.ones_like(shown_BP)
    else:
        raise InvalidInputError(f"attention_mask must be [batch, tokens], got {tuple(mask.shape)} for batch {batch}.")
    changed_BP = _changed(shown_BP, covered_BP, record) if past else None
    return (None if bool(real_BL.all()) else real_BL), changed_BP


def _changed(shown_BP: Tensor, covered_BP: Tensor, record: CacheRecord) -> Tensor | None:
    """Return the shown slots if they differ from the record, else None; dropped slots are only counted."""
    if record.dropped:
        if shown_BP.sum(1).tolist() == [row.dropped + row.length for row in record.rows]:
            return None
        raise InvalidInputError(
            "attention_mask hides or reveals tokens that a bounded cache holds or has dropped: a row's padding must "
            "stay what it was when the cache was filled."
        )
    real_BP = real_slots(record, shown_BP.shape[1], shown_BP.device)
    shown_BP = torch.where(covered_BP, shown_BP, real_BP)
    if torch.equal(shown_BP, real_BP):
        return None
    if bool((shown_BP & ~real_BP).any()):
        raise InvalidInputError(
            "attention_mask reveals tokens that were padding when the cache was filled: their keys mean nothing. A "
            "row's padding must stay padding; real tokens may be hidden later."
        )
    return shown_BP


def _from_square(
    mask: Tensor, past: int, batch: int, new: int, sliding_window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Read a 4-D mask: real new slots [B, L], shown earlier slots [B, P], and which of those it covers [B, P]."""
    rows, _, queries, keys = mask.shape
    slots = past + new
    if rows not in (1, batch) or queries != new or keys < new:
        raise InvalidInputError(
            f"a 4-D attention_mask must be [batch, 1, new tokens, tokens], got {tuple(mask.shape)} for a batch of "
            f"{batch}, {past} tokens in the cache and {new} new ones."
        )
    allowed_BLK = (mask if mask.dtype == torch.bool else ~(mask <= BLOCKED))[:, 0].expand(batch, -1, -1)
    offset = max(0, slots - keys)  # a full sliding cache shows its last slots only
    query_L = torch.arange(past, slots, device=mask.device)
    real_BL = allowed_BLK[:, torch.arange(new, device=mask.device), query_L - offset]
    shown_BP = torch.zeros((batch, past), dtype=torch.bool, device=mask.device)
    if past > offset:
        seen_BLP = allowed_BLK[:, :, : past - offset]
        shown_BP[:, offset:] = torch.where(real_BL[..., None], seen_BLP, False).any(1)
    covered_P = torch.arange(past, device=mask.device) >= offset
    if sliding_window is not None:
        covered_P &= torch.arange(past, device=mask.device) > past - sliding_window
    return real_BL, shown_BP, covered_P & real_BL.any(1)[:, None]  # the mask of a padding token says nothing


def mask_fault(mask: Tensor, record: CacheRecord, past: int, offset: int, sliding_window: int | None) -> str | None:
    """Describe what the mask of a layer asks for beyond causal attention, its sliding window and padding; else None.

    Parameters
    ----------
    mask : bool or float, [B or 1, 1 or H, L, K]
        As it reaches the attention function.
    record : CacheRecord
        The tokens, those of the forward included.
    past, offset : int
        Slots before the forward, and the slot of the mask's first key.
    sliding_window : int or None
        The layer's own sliding window, in tokens.
    """
    if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
        return "it is not the same for every head"
    mask_BLK = mask[:, 0].expand(len(record.rows), -1, -1)
    slots, keys = record.slots, mask_BLK.shape[-1]
    real_BT = real_slots(record, slots, mask.device)
    key_K = torch.arange(offset, offset + keys, device=mask.device)
    visible_BK = torch.zeros((len(record.rows), keys), dtype=torch.bool, device=mask.device)
    visible_BK[:, key_K < slots] = real_BT[:, key_K[key_K < slots]]
    rows = max(1, PAIRS // (len(record.rows) * keys))
    for low in range(0, slots - past, rows):
        part_BLK = mask_BLK[:, low : low + rows]
        query_L1 = torch.arange(past + low, past + low + part_BLK.shape[1], device=mask.device)[:, None]
        within_LK = key_K <= query_L1
        if sliding_window is not None:
            within_LK = within_LK & (query_L1 - key_K < sliding_window)
        real_BL1 = real_BT[:, past + low : past + low + part_BLK.shape[1], None]
        fault = _part_fault(part_BLK, within_LK & visible_BK[:, None], real_BL1, key_K > query_L1)
        if fault is not None:
            return fault
    return None


def _part_fault(part_BLK: Tensor, expected_BLK: Tensor, real_BL1: Tensor, later_LK: Tensor) -> str | None:
    allowed_BLK = part_BLK
    if part_BLK.dtype != torch.bool:
        allowed_BLK = part_BLK == 0
        if bool((real_BL1 & ~allowed_BLK & ~(part_BLK <= BLOCKED)).any()):
            return "it adds values to the logits"
    if not bool((real_BL1 & (allowed_BLK != expected_BLK)).any()):
        return None
    if bool((real_BL1 & allowed_BLK & later_LK).any()):
        return "it lets tokens attend later ones, as the tokens of an image do"
    if bool((real_BL1 & allowed_BLK & ~expected_BLK).any()):
        return "it shows padding, or keys beyond the layer's sliding window"
    return "it hides keys that are neither padding nor beyond a sliding window of the layer (packed sequences, blocks)"
