"""Everything that posenc knows about one KV cache, in one object that is an attribute of the cache.

The decoder's hooks (``posenc/hf/hooks.py``) describe each call as a :class:`Forward`. :meth:`CacheState.begin` checks
the cache before the layers run and accounts for the new tokens; :meth:`CacheState.finish` stores the new state after
they have run. If a forward breaks off in between, the old state stays, and the next forward finds more tokens in the
cache than were recorded. As the state travels with the cache, copies, crops and several caches at once need no care.

Shape letters: B batch, L new tokens, P slots before the forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posenc.errors import InvalidInputError
from posenc.hf.attachment import Attachment, Layers
from posenc.hf.cache.decode_tables import DecodeTables, StaticDecodeTables, build_or_advance
from posenc.hf.cache.padding import read_padding
from posenc.hf.cache.record import CacheRecord, checked_record, empty_record
from posenc.hf.cache.rotated_keys import FEW_TOKENS, RotatedKeys
from posenc.hf.cache.witness import Witness, witness_of
from posenc.hf.transformers_names import cache_of

ATTRIBUTE = "_posenc_state"


@dataclass(frozen=True)
class Forward:
    """One forward of the decoder, as it was called.

    Parameters
    ----------
    attachment : Attachment
        What the hooks of the model share.
    cache : Cache or None
        The KV cache that was passed to the forward.
    past : int
        Tokens that the cache has seen.
    position_ids_BL : int64 [B, L]
        Position ids of the new tokens.
    mask : Tensor, dict of Tensor or None
        The attention mask.
    candidates : int
        How many of the new tokens are guesses of assisted generation.
    """

    attachment: Attachment
    cache: Any
    past: int
    position_ids_BL: Tensor
    mask: Any
    candidates: int = 0

    @classmethod
    def of(
        cls, attachment: Attachment, kwargs: Mapping[str, Any], tokens_BL: Tensor, *, candidates: int = 0
    ) -> Forward:
        """Read the keyword arguments of a forward.

        Parameters
        ----------
        attachment : Attachment
            What the hooks of the model share.
        kwargs : mapping
            Keyword arguments of the decoder's forward.
        tokens_BL : Tensor
            Ids [B, L] or embeddings [B, L, hidden] of the new tokens.
        candidates : int
            How many of the new tokens are guesses of assisted generation.

        Raises
        ------
        InvalidInputError
            If there are no tokens, or the position ids have several dimensions.
        """
        batch, new = tokens_BL.shape[:2]
        if new == 0:
            raise InvalidInputError("the model got no tokens: the text is empty. Pass at least one token.")
        cache = cache_of(kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        ids = kwargs.get("position_ids")
        if ids is None:
            ids = (torch.arange(new, device=tokens_BL.device) + past)[None]
        if ids.ndim != 2:
            raise InvalidInputError(
                f"position_ids must be [batch, tokens], got {tuple(ids.shape)}: positions of several dimensions "
                "(mrope) cannot be remapped. Load the text-only model of the family."
            )
        return cls(attachment, cache, past, ids.expand(batch, -1), kwargs.get("attention_mask"), candidates)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.position_ids_BL.shape[0]

    @property
    def new(self) -> int:
        """Number of new slots in each row, padding included."""
        return self.position_ids_BL.shape[1]


@dataclass(frozen=True)
class CachedTokens:
    """The tokens that one forward works on.

    Parameters
    ----------
    record : CacheRecord
        The tokens of the cache and those of the forward.
    past : int
        Slots in the cache before the forward.
    remaining : CacheRecord
        The tokens that the cache holds after the forward; a bounded cache drops some.
    rotated : RotatedKeys, optional
        Rotated copies of the keys from earlier decoding steps.
    """

    record: CacheRecord
    past: int
    remaining: CacheRecord
    rotated: RotatedKeys | None = None


@dataclass
class CacheState:
    """What posenc keeps about one KV cache between two forwards.

    Parameters
    ----------
    record : CacheRecord, optional
        Position ids, padding and schedules of the tokens that it holds.
    tables : StaticDecodeTables or NoDecodeTables, optional
        For a static cache, what every token will attend until it is full.
    rotated : RotatedKeys, optional
        Rotated copies of its keys.
    witness : Witness, optional
        A copy of some of its keys, by which changes are found.
    step : CompiledStep, optional
        The compiled step of the running forward, for attention modules whose layer drops keyword arguments.
    """

    record: CacheRecord | None = None
    tables: DecodeTables | None = None
    rotated: RotatedKeys | None = None
    witness: Witness | None = None
    step: Any = None

    @classmethod
    def of(cls, cache: Any) -> CacheState:
        """Return the state of a cache, a new one if it has none; without a cache, one for this forward alone."""
        state = getattr(cache, ATTRIBUTE, None)
        if state is None:
            state = cls()
            if cache is not None:
                setattr(cache, ATTRIBUTE, state)
        assert isinstance(state, CacheState)
        return state

    def begin(self, forward: Forward) -> CachedTokens:
        """Check the cache and account for the new tokens of a forward, before its layers run.

        Raises
        ------
        CacheMismatchError
            If the cache does not hold what this strategy left there.
        InvalidInputError
            If the mask has the wrong shape or reveals padding, or the announced prompt length does not fit.
        """
        attachment = forward.attachment
        record = self._present(forward)
        real_BL, shown_BP = read_padding(
            forward.mask, forward.past, forward.batch, forward.new, record, attachment.reach
        )
        if shown_BP is not None:
            record = record.hiding(shown_BP)
        past = forward.past - record.dropped  # slots that a bounded cache still holds
        retain = getattr(forward.cache, "retain", None)  # a bounded cache, whose plans do not depend on the prompt
        record = record.extended(
            past,
            forward.position_ids_BL,
            real_BL,
            attachment.planner,
            candidates=forward.candidates,
            announced=None if retain else attachment.announced_rows(forward.batch),
        )
        rotated = self._rotated_keys(forward, past) if attachment.cache == "rotated" else None
        return CachedTokens(record, past, retain(record) if retain else record, rotated)

    def finish(self, cache: Any, tokens: CachedTokens, layers: Layers, *, compiling: bool) -> None:
        """Store what a forward leaves in its cache, after its layers have run.

        Parameters
        ----------
        cache : Cache
            The KV cache.
        tokens : CachedTokens
            What :meth:`begin` returned.
        layers : Layers
            What the attention layers of the forward share.
        compiling : bool
            Whether torch.compile runs the forward.
        """
        self.record = tokens.remaining
        if self.witness is None:
            self.witness = witness_of(cache, layers.attachment.witnesses)
        if self.witness is not None:
            unchanged = tokens.past if tokens.remaining is tokens.record else 0
            self.witness.note(cache, tokens.remaining.slots, unchanged)
        self.tables = build_or_advance(self.tables, cache, tokens.record, tokens.past, layers, compiling=compiling)

    def _present(self, forward: Forward) -> CacheRecord:
        """Return the record of the tokens that the cache holds before the forward, with its rows as they are now."""
        attachment, past = forward.attachment, forward.past
        if past == 0:
            return empty_record(attachment.fingerprint, forward.batch, forward.position_ids_BL.device)
        if isinstance(self.tables, StaticDecodeTables) and self.record is not None:
            self.record = self.tables.absorb_decoded_tokens(self.record, attachment.planner)
        record = checked_record(self.record, past, attachment.fingerprint)
        if self.witness is None:
            return record
        return self.witness.check(forward.cache, record, past - record.dropped, forward.batch)

    def _rotated_keys(self, forward: Forward, past: int) -> RotatedKeys | None:
        """Return the checked copies for a decoding step; a prompt gets none, and drops those of earlier steps."""
        if forward.cache is None:
            return None
        if past == 0 or forward.new > FEW_TOKENS:
            self.rotated = None
            return None
        if self.rotated is None:
            self.rotated = RotatedKeys()
        self.rotated.check(forward.cache, past)
        return self.rotated
