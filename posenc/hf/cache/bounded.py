"""A cache that drops the keys which its strategy never attends again: bounded memory in endless generation.

``handle.bounded_cache()`` makes it. Each row keeps its first and its last tokens, joined as if the text between them
had never been there. A strategy with :class:`~posenc.params.Retention` plans this shorter text exactly as it plans the
whole text, so plans, records and masks stay as short as the cache. :meth:`BoundedCache.retain`, called before the
layers of a forward run, says which slots stay after it.

Shape letters: B batch, H heads, K slots that stay, T slots before some are dropped, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from posenc.errors import CacheMismatchError, InvalidConfigError, UnsupportedModelError
from posenc.hf.cache.record import CacheRecord, Row
from posenc.params import Retention
from posenc.planning.schedule import Schedule
from posenc.positions import PositionStrategy


def retention(strategy: PositionStrategy) -> Retention:
    """Return what a bounded cache keeps under a strategy.

    Raises
    ------
    InvalidConfigError
        If a dropped key could be attended again, or plans depend on the length of the whole text.
    """
    kept = strategy.retention
    if kept is None:
        raise InvalidConfigError(
            f"strategy {strategy.name!r} may attend every key again, so no cache can drop any. Use DynamicCache, or a "
            "strategy that keeps only some keys (streaming_llm, lm_infinite)."
        )
    if strategy.active_from:
        raise InvalidConfigError(
            f"{strategy.name}.active_from: prompts up to {strategy.active_from} tokens attend every key, also "
            "after thousands of new tokens, so no cache can drop any. Set active_from to 0."
        )
    if strategy.follows_prompt:
        raise InvalidConfigError(
            f"strategy {strategy.name!r} follows the length of the whole text, which a bounded cache does not hold. "
            "Combine it with frequencies that do not depend on the length."
        )
    return kept


@dataclass
class Dropping:
    """What every layer of a cache drops in the running forward.

    Parameters
    ----------
    slots_BK : int64 [B, K] or None
        The slots that stay; None if all do.
    count : int
        How many slots are dropped.
    """

    slots_BK: Tensor | None = None
    count: int = 0


class BoundedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer that returns all keys and values that it holds, and then drops those that its cache tells it to.

    Parameters
    ----------
    dropping : Dropping
        What to drop, shared by the layers of a cache.
    """

    is_croppable = False

    def __init__(self, dropping: Dropping) -> None:
        super().__init__()
        self.dropping = dropping
        self.dropped = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k_BHTD, v_BHTD = super().update(key_states, value_states, *args, **kwargs)
        if self.dropping.slots_BK is not None:
            slots_B1K1 = self.dropping.slots_BK[:, None, :, None].to(k_BHTD.device)
            self.keys, self.values = (torch.take_along_dim(x, slots_B1K1, dim=2) for x in (k_BHTD, v_BHTD))
            self.dropped += self.dropping.count
        return k_BHTD, v_BHTD

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, dropped ones included: position ids count them too."""
        return int(super().get_seq_length()) + self.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() - self.dropped + query_length, self.dropped

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.dropped:
            raise CacheMismatchError(
                "a bounded cache that has dropped keys cannot be cut back: the keys it would need are gone. Use "
                "DynamicCache where tokens are taken back (assisted generation, prompt lookup)."
            )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.dropped = 0


class BoundedCache(DynamicCache):  # type: ignore[misc]
    """The cache of ``handle.bounded_cache()``, which makes it because only a patched model can fill it.

    Between two forwards it holds at most ``first + last + slack`` slots per layer, and during a forward also its new
    tokens.

    Parameters
    ----------
    config : PreTrainedConfig
        The decoder's configuration.
    kept : Retention
        What each row keeps once slots are dropped.
    slack : int
        Slots to gather before some are dropped, so that not every token moves the whole cache.
    fingerprint : str
        The strategy in force.

    Raises
    ------
    UnsupportedModelError
        If a layer stores its keys in another form.
    """

    def __init__(self, config: PreTrainedConfig, *, kept: Retention, slack: int, fingerprint: str) -> None:
        super().__init__(config=config)
        self.kept, self.slack, self.fingerprint = kept, slack, fingerprint
        self.dropping = Dropping()
        self.layers: list[Any] = [self._bounded(layer) for layer in self.layers]

    def _bounded(self, layer: Any) -> Any:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            return BoundedLayer(self.dropping)
        if not isinstance(layer, DynamicLayer):
            return layer  # no keys: a linear state, or a layer that reads another one's cache
        raise UnsupportedModelError(
            f"this model caches more than keys and values ({type(layer).__name__}), which a bounded cache cannot drop. "
            "Use the model's own cache."
        )

    def retain(self, record: CacheRecord) -> CacheRecord:
        """Decide which slots stay after a forward; called by :meth:`CacheState.begin`, before the layers run.

        Parameters
        ----------
        record : CacheRecord
            The tokens in the cache and those of the forward.

        Returns
        -------
        CacheRecord
            The tokens that stay.

        Raises
        ------
        CacheMismatchError
            If the cache was made for another strategy, or an earlier forward broke off between the layers.
        """
        if record.fingerprint != self.fingerprint:
            raise CacheMismatchError(
                f"this bounded cache was made for {self.fingerprint}, and the model now runs {record.fingerprint}: it "
                "would drop the wrong keys. Call handle.bounded_cache() again."
            )
        layers = [layer for layer in self.layers if isinstance(layer, BoundedLayer)]
        if {layer.dropped for layer in layers} != {record.dropped}:
            raise CacheMismatchError(
                "an earlier forward broke off before every layer had dropped its keys. Start from an empty cache."
            )
        self.dropping.slots_BK = None
        if record.slots <= self.kept.first + self.kept.last + self.slack:
            return record
        kept_slots = [self._kept_slots(row) for row in record.rows]
        width = max(len(slots) for slots in kept_slots)
        device = record.position_ids_BT.device
        slots_BK = torch.tensor([[0] * (width - len(slots)) + slots for slots in kept_slots], device=device)
        self.dropping.slots_BK, self.dropping.count = slots_BK, record.slots - width
        rows = tuple(
            Row(
                ((width - len(slots), width),) if slots else (),
                Schedule(((1, len(slots)),)) if slots else Schedule(),
                row.consecutive,
                row.dropped + row.length - len(slots),
            )
            for row, slots in zip(record.rows, kept_slots, strict=True)
        )
        ids_BK = torch.take_along_dim(record.position_ids_BT, slots_BK, dim=1)
        return replace(record, position_ids_BT=ids_BK, rows=rows, dropped=record.dropped + self.dropping.count)

    def _kept_slots(self, row: Row) -> list[int]:
        """Return the slots of the row's first and last real tokens."""
        slots = [slot for start, stop in row.spans for slot in range(start, stop)]
        first, last = self.kept.first, self.kept.last
        return slots if len(slots) <= first + last else slots[:first] + slots[len(slots) - last :]
