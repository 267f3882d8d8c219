"""The handle of a patched model: what it runs, announcements to it, and how the strategy comes off again."""

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
        """The plan the model uses for a prompt of ``prompt`` tokens, ``total`` tokens present.

        Parameters
        ----------
        layer : int, optional
            Of which attention layer, for strategies whose layers see different positions.

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
            If a length is not an ``int`` of at least 1 (here), or the number of lengths is not the batch size (in
            the forward).
        """
        announced = _announced_lengths(tokens)
        with self._attachment.announcing(announced):
            yield self

    def bounded_cache(self, *, slack: int = 64) -> BoundedCache:
        """An empty cache that drops the keys which the strategy never attends again.

        Pass it as ``cache`` (``past_key_values`` before transformers 5.24). Between two forwards it holds at most
        ``first + last + slack`` tokens of each row (``strategy.retention``; ``last`` at least the model's largest
        sliding window), and gives the same logits as a cache of all tokens.

        Parameters
        ----------
        slack : int
            Tokens to gather before some are dropped.

        Raises
        ------
        InvalidConfigError
            If the strategy may attend every key again, or ``slack`` is negative.
        UnsupportedModelError
            If some layers attend every key whatever the strategy: those without rotary positions.
        """
        from posenc.hf.cache.bounded import BoundedCache, retention

        kept = retention(self.strategy)
        if slack < 0:
            raise InvalidConfigError(f"slack: must be 0 or more tokens, got {slack}.")
        layers = len(self._attachment.facts)
        if any(self.strategy.for_layer(layer, layers).retention != kept for layer in range(layers)):
            raise InvalidConfigError(
                f"strategy {self.strategy.name!r} keeps other keys in other layers, which one bounded cache cannot."
            )
        facts = self._attachment.facts.values()
        if any(layer.source is None for layer in facts):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has layers without rotary positions, which attend every key under any "
                "strategy: a bounded cache would change what they see. Use the model's own cache."
            )
        # A layer's window counts dropped keys too: beyond it, the joined text must not look nearer.
        last = max([kept.last, *(layer.sliding_window for layer in facts if layer.sliding_window is not None)])
        config: Any = self._attachment.adapter.decoder(self.model).config
        return BoundedCache(
            config, kept=Retention(kept.first, last), slack=slack, fingerprint=self._attachment.fingerprint
        )

    def describe(self) -> dict[str, Any]:
        """What is applied to what, as plain data."""
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
        """What the probe measured, one line per kind of attention layer."""
        count: dict[LayerFacts, int] = {}
        for facts in self._attachment.facts.values():
            count[facts] = count.get(facts, 0) + 1
        return [f"{number} x {facts.describe()}" for facts, number in count.items()]

    def remove(self) -> None:
        """Take every hook off the model; a second call does nothing.

        Caches filled while the handle was active hold raw keys: do not use them afterwards. Continuous
        batching that still runs on the model is stopped, with a warning.

        Raises
        ------
        ModelBusyError
            If the model is running in another thread; the strategy stays on.
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
    """The handle of a patched model (also of a deepcopy of one), or None."""
    attachment = find_attachment(model)
    return None if attachment is None else Handle(model, attachment)


def restore(model: nn.Module, attachment: Attachment) -> None:
    """Take every hook off a model and give it its own attention back."""
    uninstall(model)
    attachment.adapter.decoder(model).set_attn_implementation(attachment.original)  # type: ignore[operator]


def _announced_lengths(tokens: Any) -> int | list[int]:
    listed = isinstance(tokens, list | tuple)
    lengths = list(tokens) if listed else [tokens]
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int):
            raise InvalidInputError(
                f"prompt_length takes a whole number of tokens (int), or a list of them, one per row: got {length!r} "
                f"({type(length).__name__}). Convert it with int(...) or .tolist()."
            )
        Lengths(length, length)
    if not lengths:
        raise InvalidInputError("prompt_length got an empty list: give one length, or one per row.")
    return lengths if listed else lengths[0]
