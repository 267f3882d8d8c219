"""The state of a KV cache: read and checked before a forward, left on the cache after it.

Nothing is written before the layers have run, so a forward that breaks off leaves the state of the one before it,
and the next forward sees that the cache holds more than was accounted for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from posenc.adapter import LayerFacts
from posenc.hf.attachment import Attachment
from posenc.hf.cache.decode_tables import ATTRIBUTE as HORIZON
from posenc.hf.cache.decode_tables import Horizon, look_ahead
from posenc.hf.cache.record import ATTRIBUTE, CacheRecord, empty_record, read_record
from posenc.hf.cache.witness import ATTRIBUTE as WITNESS
from posenc.hf.cache.witness import witness_of
from posenc.hf.own_frequencies import Base


def begin(cache: Any, past: int, attachment: Attachment, batch: int, device: torch.device) -> CacheRecord:
    """The record of a cache that holds ``past`` tokens, its rows as they are now.

    Raises
    ------
    CacheMismatchError
        If the cache holds something else than this strategy left there.
    """
    if past == 0:
        return empty_record(attachment.fingerprint, batch, device)
    horizon = getattr(cache, HORIZON, None)
    if isinstance(horizon, Horizon):
        setattr(cache, ATTRIBUTE, horizon.settle(getattr(cache, ATTRIBUTE), attachment))
    record = read_record(cache, past, attachment.fingerprint)
    witness = getattr(cache, WITNESS, None)
    return record if witness is None else witness.check(cache, record, past - record.dropped, batch)


def finish(
    cache: Any,
    record: CacheRecord,
    leaves: CacheRecord,
    past: int,
    bases: Mapping[LayerFacts, Base],
    attachment: Attachment,
    decoder: nn.Module,
    *,
    compiling: bool,
) -> None:
    """Leave the state after a forward on its cache."""
    setattr(cache, ATTRIBUTE, leaves)
    if getattr(cache, WITNESS, None) is None:
        setattr(cache, WITNESS, witness_of(cache, attachment.witnesses))
    witness = getattr(cache, WITNESS)
    if witness is not None:
        witness.note(cache, leaves.slots, past if leaves is record else 0)
    look_ahead(cache, record, past, attachment, decoder, bases, compiling=compiling)
