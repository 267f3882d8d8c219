"""Apply a strategy to a model, and take it off again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from posenc.adapter import EVERY_FAMILY, ArchitectureAdapter, LayerFacts
from posenc.config import CacheMode, Config, NamedParams, load_config, read_config
from posenc.errors import InvalidConfigError, InvalidInputError, UnsupportedModelError
from posenc.hf import continuous_batching as continuous
from posenc.hf.attachment import Attachment
from posenc.hf.exclusive import alone
from posenc.hf.fingerprint import fingerprint
from posenc.hf.hooks import (
    IMPLEMENTATIONS,
    STEP,
    find_attachment,
    install,
    register_with_transformers,
    uninstall,
)
from posenc.hf.probe.probe import check_structure, execution_device, probe
from posenc.hf.probe.selftest import check_attention, check_identity, forward_of_fixed_tokens
from posenc.hf.stock import STOCK_IMPLEMENTATIONS
from posenc.params import Retention
from posenc.plan import PositionPlan
from posenc.planning.composed import ComposedStrategy
from posenc.planning.planner import Planner, fitted
from posenc.plugins import adapters, backends
from posenc.plugins import strategy as named_strategy
from posenc.positions import IdentityStrategy, PositionStrategy
from posenc.rope import Rotary
from posenc.segment import Lengths
from posenc.trace import trace

if TYPE_CHECKING:
    from posenc.hf.cache.bounded import BoundedCache


WRAPPED = ("_orig_mod", "module")
"""Where torch.compile and data parallel wrappers keep the model they wrap."""


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
        last = max([kept.last, *(layer.window for layer in facts if layer.window is not None)])
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
        continuous.stop(self.model)
        with alone(self.model, self._attachment.adapter.decoder(self.model), "remove the strategy"):
            _restore(self.model, self._attachment)

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


def apply(
    model: nn.Module,
    strategy: str | PositionStrategy | Config | dict[str, Any] | os.PathLike[str],
    *,
    frequencies: str | dict[str, Any] | PositionStrategy | None = None,
    backend: str | None = None,
    cache: CacheMode | None = None,
    window: int | None = None,
    **params: Any,
) -> Handle:
    """Let a model read past its pretraining window.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        A model with rotary positions, loaded with ``sdpa`` or ``eager`` attention.
    strategy : str, PositionStrategy, Config, dict or path
        A strategy by name, a strategy object, a configuration, or the path of a YAML file.
    frequencies : str, dict or PositionStrategy, optional
        A frequency strategy to combine with it: a name or ``{"name": "yarn", "factor": 4}``.
    backend : str, optional
        Attention backend by name; ``"auto"`` by default.
    cache : {"rotated", "raw"}, optional
        Decoding reads raw keys, which a backend such as ``cpu_flash`` must rotate. ``"rotated"`` (the
        default) keeps their rotated copies beside them, so that a step rotates new keys only; the keys
        then take twice the memory, the values what they did. ``"raw"`` keeps nothing and rotates every key
        at every step. Prompts, and backends that rotate while they read, keep nothing either way.
    window : int, optional
        Pretraining window in tokens, by default what the model's configuration declares.
    **params
        Parameters of a strategy given by name.

    Returns
    -------
    Handle
        Removes everything again; also a context manager.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be served exactly; it is left untouched.
    ModelBusyError
        If the model is running in another thread.
    UnknownNameError, InvalidConfigError
        If a name or a parameter is wrong.
    """
    model = unwrapped(model)
    adapter = find_adapter(model)
    decoder = adapter.decoder(model)
    adapter.rotary_modules(decoder)
    window = adapter.window(model) if window is None else window
    chosen, configured = resolve_strategy(strategy, window, frequencies, params)
    chosen = chosen.for_model(lambda: fingerprint(model, adapter))
    backend = backend or (configured.backend if configured else "auto")
    cache = cache or (configured.cache if configured else "rotated")
    if cache not in get_args(CacheMode):
        raise InvalidConfigError(f"cache: must be one of {', '.join(get_args(CacheMode))}, got {cache!r}.")
    if backend != "auto":
        backends()[backend]
    config: Any = decoder.config
    original = config._attn_implementation
    for stock, ours in IMPLEMENTATIONS.items():  # a model that shares its config object with a patched one
        original = stock if original == ours else original
    if original not in STOCK_IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"the model was loaded with attn_implementation={original!r}. posenc is exact on top of "
            f"{' or '.join(STOCK_IMPLEMENTATIONS)}: load it with one of them."
        )
    attachment = Attachment(chosen, adapter, backend, original, cache)
    with alone(model, decoder, "apply a strategy"):
        if find_attachment(model) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} already has a posenc strategy: call handle.remove() first "
                "(posenc.attached(model) returns the handle)."
            )
        _attach(model, decoder, attachment)
    trace("applied %r to %s (adapter %s)", chosen, type(model).__name__, adapter.name)
    return Handle(model, attachment)


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


def attached(model: nn.Module) -> Handle | None:
    """The handle of a patched model (also of a deepcopy of one), or None."""
    attachment = find_attachment(model)
    return None if attachment is None else Handle(model, attachment)


def find_adapter(model: nn.Module) -> ArchitectureAdapter:
    """The adapter for a model's family.

    Raises
    ------
    UnsupportedModelError
        If it is not a transformers causal decoder, or no adapter serves its family.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        inner = next(
            (name for name in ("_orig_mod", "module") if isinstance(getattr(model, name, None), nn.Module)), None
        )
        cure = (
            "Pass the whole model if this is a part of one; for other models call posenc.attention on raw queries and "
            "keys."
            if inner is None
            else f"It wraps one: apply posenc to its .{inner}, or before wrapping."
        )
        raise UnsupportedModelError(f"posenc.apply serves transformers models, got {type(model).__name__}. {cure}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder; posenc serves causal decoders.")
    for model_type in (model.config.model_type, EVERY_FAMILY):
        for info in adapters().values():
            if model_type in info.adapter.model_types:
                adapter: ArchitectureAdapter = info.adapter
                return adapter
    served = sorted({name for info in adapters().values() for name in info.adapter.model_types})
    raise UnsupportedModelError(
        f"no adapter serves the family {model.config.model_type!r} ({type(model).__name__}). Served: "
        f"{', '.join(served)}. A plugin can add one: see docs/write-an-adapter.md."
    )


def unwrapped(model: Any) -> Any:
    """The transformers model that a PEFT model adapts: the hooks go there, and serve both."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def resolve_strategy(
    value: Any, window: int | None, frequencies: Any, params: dict[str, Any]
) -> tuple[PositionStrategy, Config | None]:
    """A strategy object (and the configuration it came from) from every form that ``apply`` accepts."""
    configured: Config | None = None
    if isinstance(value, os.PathLike) or (isinstance(value, str) and value.endswith((".yaml", ".yml"))):
        value = load_config(Path(value))
    elif isinstance(value, dict):
        value = read_config(value if "strategy" in value else {"strategy": value})
    if params and not isinstance(value, str):
        raise InvalidConfigError(
            f"parameters ({', '.join(sorted(params))}) can only be given with a strategy's name: "
            f"this {type(value).__name__} has its own."
        )
    if isinstance(value, Config):
        configured = value
        made = value.make(window)
    elif isinstance(value, str):
        made = named_strategy(value, window=window, **params)
    elif isinstance(value, PositionStrategy):
        made = value
    else:
        raise InvalidConfigError(f"strategy: expected a name, a strategy, a config or a path, got {value!r}.")
    if frequencies is not None:
        if not isinstance(frequencies, PositionStrategy):
            frequencies = _named(frequencies).make(window)
        made = ComposedStrategy(made, frequencies)
    return made, configured


def _named(value: Any) -> NamedParams:
    if isinstance(value, str):
        return NamedParams(name=value)
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return NamedParams(**value)
    raise InvalidConfigError(f"frequencies: expected NAME or {{name: NAME, param: value}}, got {value!r}.")


def _attach(model: Any, decoder: Any, attachment: Attachment) -> None:
    """Probe the layers, install the hooks, and prove that the identity plan is stock; undo everything otherwise."""
    check_structure(model, decoder)
    register_with_transformers()
    ours = IMPLEMENTATIONS[attachment.original]
    decoder.set_attn_implementation(attachment.original)  # where a model of the same configuration is patched
    expected = forward_of_fixed_tokens(decoder)
    decoder.set_attn_implementation(ours)  # not the whole model: it may hold a vision tower
    try:
        if decoder.config._attn_implementation != ours:
            raise UnsupportedModelError(
                f"{type(model).__name__} ({decoder.config.model_type!r}) does not let its attention be replaced "
                "through transformers' AttentionInterface, so its queries and keys are out of reach."
            )
        findings = probe(model, decoder, attachment.adapter, STEP)
        check_attention(decoder, findings.calls, attachment.original)
        attachment.facts, attachment.rotaries = findings.facts, findings.rotaries
        attachment.planner = Planner(IdentityStrategy())
        install(model, decoder, attachment)
        check_identity(decoder, expected, attachment.adapter)
        bases = _own_frequencies(decoder, attachment)
        attachment.strategy = fitted(attachment.strategy, bases)
        attachment.fingerprint = attachment.strategy.fingerprint
        attachment.planner = Planner(attachment.strategy, len(attachment.facts))
        attachment.planner.try_out(bases)
    except BaseException:
        _restore(model, attachment)
        raise


def _own_frequencies(decoder: Any, attachment: Attachment) -> list[Rotary | None]:
    """The frequencies that the model has, by attention layer; None where it has no rotary positions."""
    device = execution_device(decoder.get_input_embeddings())
    bases = attachment.bases(decoder, torch.zeros(1, 1, dtype=torch.long, device=device))
    return [bases[facts].stock if facts in bases else None for facts in attachment.facts.values()]


def _restore(model: Any, attachment: Attachment) -> None:
    uninstall(model)
    attachment.adapter.decoder(model).set_attn_implementation(attachment.original)  # type: ignore[operator]
