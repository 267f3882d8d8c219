"""``posenc.apply``: choose the strategy, probe the model, install the hooks, and check the result.

This is the entry to ``posenc/hf``. The adapter says where the model keeps its parts, the probe measures what each
attention layer does (``posenc/hf/probe``), the hooks go in (``posenc/hf/hooks.py``), and with the identity plan the
patched model must compute exactly what the unpatched one does. If anything fails, the model is left as it was.
"""

from __future__ import annotations

import os
from typing import Any, get_args

import torch
from torch import nn

from posenc.adapter import EVERY_FAMILY, ArchitectureAdapter
from posenc.config import CacheMode, Config, resolve_strategy
from posenc.errors import InvalidConfigError, UnsupportedModelError
from posenc.hf.attachment import Attachment
from posenc.hf.exclusive import exclusive
from posenc.hf.fingerprint import fingerprint
from posenc.hf.handle import Handle, restore
from posenc.hf.hooks import IMPLEMENTATIONS, STEP, find_attachment, install, register_with_transformers
from posenc.hf.probe.probe import check_structure, execution_device, probe
from posenc.hf.probe.selftest import check_attention, check_identity, forward_of_fixed_tokens
from posenc.hf.stock import STOCK_IMPLEMENTATIONS
from posenc.planning.planner import Planner, fitted
from posenc.plugins import adapters, backends
from posenc.positions import IdentityStrategy, PositionStrategy
from posenc.rope import Rotary
from posenc.trace import trace

WRAPPED = ("_orig_mod", "module")
"""Attributes in which torch.compile and data parallel wrappers keep the wrapped model."""


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
        default) keeps rotated copies beside the raw keys, so that a step rotates new keys only; the keys
        then take twice the memory, the values the same as before. ``"raw"`` keeps no copies and rotates every
        key at every step. Prompts, and backends that rotate while they read, keep no copies either way.
    window : int, optional
        Pretraining window in tokens, by default the one that the model's configuration declares.
    **params
        Parameters of a strategy given by name.

    Returns
    -------
    Handle
        Describes what is applied and removes it again; also a context manager.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be served exactly; it stays as it was.
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
    position_strategy, configuration = resolve_strategy(strategy, window, frequencies, params)
    position_strategy = position_strategy.for_model(lambda: fingerprint(model, adapter))
    backend = backend or (configuration.backend if configuration else "auto")
    cache = cache or (configuration.cache if configuration else "rotated")
    if cache not in get_args(CacheMode):
        raise InvalidConfigError(f"cache: must be one of {', '.join(get_args(CacheMode))}, got {cache!r}.")
    if backend != "auto":
        backends()[backend]
    config: Any = decoder.config
    original = config._attn_implementation
    for stock, patched in IMPLEMENTATIONS.items():  # if the model shares its config object with a patched one
        original = stock if original == patched else original
    if original not in STOCK_IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"the model was loaded with attn_implementation={original!r}. posenc is exact on top of "
            f"{' or '.join(STOCK_IMPLEMENTATIONS)}: load it with one of them."
        )
    attachment = Attachment(position_strategy, adapter, backend, original, cache)
    with exclusive(model, decoder, "apply a strategy"):
        if find_attachment(model) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} already has a posenc strategy: call handle.remove() first "
                "(posenc.attached(model) returns the handle)."
            )
        _attach(model, decoder, attachment)
    trace("applied %r to %s (adapter %s)", position_strategy, type(model).__name__, adapter.name)
    return Handle(model, attachment)


def find_adapter(model: nn.Module) -> ArchitectureAdapter:
    """Return the adapter that serves a model's family.

    Raises
    ------
    UnsupportedModelError
        If it is not a transformers causal decoder, or no adapter serves its family.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        inner = next((name for name in WRAPPED if isinstance(getattr(model, name, None), nn.Module)), None)
        fix = (
            "Pass the whole model if this is a part of one; for other models call posenc.attention on raw queries and "
            "keys."
            if inner is None
            else f"It wraps one: apply posenc to its .{inner}, or before wrapping."
        )
        raise UnsupportedModelError(f"posenc.apply serves transformers models, got {type(model).__name__}. {fix}")
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
    """Return the transformers model inside a PEFT model: hooks on it serve both. Other models are returned as given."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _attach(model: Any, decoder: Any, attachment: Attachment) -> None:
    """Probe the layers, install the hooks, and check the identity plan; on any error, undo everything."""
    check_structure(model, decoder)
    register_with_transformers()
    patched = IMPLEMENTATIONS[attachment.original]
    decoder.set_attn_implementation(attachment.original)  # if another model of the same configuration is patched
    expected = forward_of_fixed_tokens(decoder)
    decoder.set_attn_implementation(patched)  # not on the whole model, which may have a vision tower
    try:
        if decoder.config._attn_implementation != patched:
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
        bases = _frequencies_by_layer(decoder, attachment)
        attachment.strategy = fitted(attachment.strategy, bases)
        attachment.fingerprint = attachment.strategy.fingerprint
        attachment.planner = Planner(attachment.strategy, len(attachment.facts))
        attachment.planner.try_out(bases)
    except BaseException:
        restore(model, attachment)
        raise


def _frequencies_by_layer(decoder: Any, attachment: Attachment) -> list[Rotary | None]:
    """Return the model's own frequencies by attention layer, None for a layer without rotary positions."""
    device = execution_device(decoder.get_input_embeddings())
    bases = attachment.bases(decoder, torch.zeros(1, 1, dtype=torch.long, device=device))
    return [bases[facts].stock if facts in bases else None for facts in attachment.facts.values()]
