"""The handle that ``posenc.apply`` returns: it describes the patched model, and removes the strategy again.

A handle holds the model and its :class:`~posenc.hf.attachment.Attachment`. It is a context manager: after the block the
model is restored bit for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import nn

from posenc.adapter import LayerFacts
from posenc.errors import InvalidConfigError, InvalidInputError, UnsupportedModelError
from posenc.hf import continuous_batching
from posenc.hf.attachment import Attachment
from posenc.hf.exclusive import exclusive
from posenc.hf.hooks import find_attachment, uninstall
from posenc.params import Retention
from posenc.plan import PositionPlan
from posenc.positions import PositionStrategy
from posenc.segment import Lengths

if TYPE_CHECKING:
    from posenc.hf.cache.bounded import BoundedCache


class Handle:
    """A patched model. Leaving the ``with`` block, or :meth:`remove`, restores it bit for bit."""

    def __init__(self, model: nn.Module, attachment: Attachment) -> None:
        self.model = model
        self._attachment = attachment

    @property
    def strategy(self) -> PositionStrategy:
        """The strategy in force."""
        return self._attachment.strategy

    @property
    def is_active(self) -> bool:
        """True until the handle is removed."""
        return find_attachment(self.model) is self._attachment

    def plan(self, prompt: int, total: int | None = None, *, layer: int | None = None) -> PositionPlan:
        """Return the plan that the model uses for a prompt.

        Parameters
        ----------
        prompt : int
            Tokens of the prompt.
        total : int, optional
            Tokens so far, with those decoded after the prompt; by default ``prompt``.
        layer : int, optional
            The attention layer, for strategies whose layers see different positions.

        Raises
        ------
        InvalidInputError
            If the model has no such attention layer.
        """
        if layer is None:
            return self.strategy.plan(prompt, total)
        layers = len(self._attachment.facts)
        if not 0 <= layer < layers:
            raise InvalidInputError(f"layer must be 0 .. {layers - 1}: the model has {layers} attention layers.")
        return self.strategy.for_layer(layer, layers).plan(prompt, total)

    @contextlib.contextmanager
    def prompt_length(self, tokens: int | Sequence[int]) -> Iterator[Handle]:
        """Announce the final prompt length of a chunked prefill, to the forwards of this thread (or task).

        Parameters
        ----------
        tokens : int or sequence of int
            Final number of real tokens, for all rows or one per row.

        Raises
        ------
        InvalidInputError
            If a length is not an ``int`` of at least 1 (raised here), or the number of lengths is not the batch size
            (raised by the forward).
        """
        lengths = _announced_lengths(tokens)
        with self._attachment.announcing(lengths):
            yield self

    def bounded_cache(self, *, slack: int = 64) -> BoundedCache:
        """Return an empty cache that drops the keys which the strategy never attends again.

        Pass it as ``cache`` (``past_key_values`` before transformers 5.24). It gives the same logits as a cache of all
        tokens, and between two forwards it holds at most ``first + last + slack`` tokens of each row. ``first`` and
        ``last`` come from ``strategy.retention``; ``last`` is at least the model's largest sliding window.

        Parameters
        ----------
        slack : int
            Tokens to gather before some are dropped.

        Raises
        ------
        InvalidConfigError
            If the strategy may attend every key again, or ``slack`` is negative.
        UnsupportedModelError
            If the model has layers without rotary positions, which attend every key under any strategy.
        """
        from posenc.hf.cache.bounded import BoundedCache, retention

        kept = retention(self.strategy)
        if slack < 0:
            raise InvalidConfigError(f"slack: must be 0 or more tokens, got {slack}.")
        layers = len(self._attachment.facts)
        if any(self.strategy.for_layer(layer, layers).retention != kept for layer in range(layers)):
            raise InvalidConfigError(
                f"strategy {self.strategy.name!r} keeps different keys in different layers, and a bounded cache keeps "
                "the same keys in all of them. Use DynamicCache."
            )
        facts = self._attachment.facts.values()
        if any(layer.source is None for layer in facts):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has layers without rotary positions, which attend every key under any "
                "strategy: a bounded cache would change what they see. Use the model's own cache."
            )
        # A sliding window counts dropped keys too. The kept text must not bring keys from beyond the window into it.
        last = max([kept.last, *(layer.sliding_window for layer in facts if layer.sliding_window is not None)])
        config: Any = self._attachment.adapter.decoder(self.model).config
        return BoundedCache(
            config, kept=Retention(kept.first, last), slack=slack, fingerprint=self._attachment.fingerprint
        )

    def describe(self) -> dict[str, Any]:
        """Return the model, the strategy, the backend and what the probe measured, as plain data."""
        config: Any = self._attachment.adapter.decoder(self.model).config
        return {
            "model": type(self.model).__name__,
            "model_type": config.model_type,
            "adapter": self._attachment.adapter.name,
            "strategy": self.strategy.describe(),
            "window": self.strategy.window,
            "layers": self.layers(),
            "backend": self._attachment.backend,
            "cache": self._attachment.cache,
            "active": self.is_active,
        }

    def layers(self) -> list[str]:
        """Return what the probe measured, one line per kind of attention layer."""
        counts: dict[LayerFacts, int] = {}
        for facts in self._attachment.facts.values():
            counts[facts] = counts.get(facts, 0) + 1
        return [f"{count} x {facts.describe()}" for facts, count in counts.items()]

    def remove(self) -> None:
        """Remove every hook from the model; a second call does nothing.

        Caches filled while the handle was active hold raw keys: do not use them afterwards. Continuous
        batching that still runs on the model is stopped, with a warning.

        Raises
        ------
        ModelBusyError
            If the model is running in another thread; the strategy then stays applied.
        """
        if not self.is_active:
            return
        continuous_batching.stop(self.model)
        with exclusive(self.model, self._attachment.adapter.decoder(self.model), "remove the strategy"):
            restore(self.model, self._attachment)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.is_active else "removed"
        return f"<posenc.Handle {self.strategy!r} on {type(self.model).__name__}, {state}>"

    def _repr_html_(self) -> str:
        from posenc.display.notebook import handle_html

        return handle_html(self.describe())


def attached(model: nn.Module) -> Handle | None:
    """Return the handle of a patched model (or of a deepcopy of one), or None."""
    attachment = find_attachment(model)
    return None if attachment is None else Handle(model, attachment)


def restore(model: nn.Module, attachment: Attachment) -> None:
    """Remove every hook from a model and restore its own attention implementation."""
    uninstall(model)
    attachment.adapter.decoder(model).set_attn_implementation(attachment.original)  # type: ignore[operator]


def _announced_lengths(tokens: Any) -> int | list[int]:
    several = isinstance(tokens, list | tuple)
    lengths = list(tokens) if several else [tokens]
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int):
            raise InvalidInputError(
                f"prompt_length takes a whole number of tokens (int), or a list of them, one per row: got {length!r} "
                f"({type(length).__name__}). Convert it with int(...) or .tolist()."
            )
        Lengths(length, length)
    if not lengths:
        raise InvalidInputError("prompt_length got an empty list: give one length, or one per row.")
    return lengths if several else lengths[0]
