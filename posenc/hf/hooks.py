"""The hooks that ``posenc.apply`` puts on a transformers model, and the attention functions that it registers.

No forward is replaced. Before the decoder's forward, :class:`DecoderHook` makes a :class:`~posenc.hf.step.Step`. It
travels down as a keyword argument and so reaches every attention layer, also when gradient checkpointing runs a layer
again. After a rotary module's forward, :class:`RotaryHook` replaces its tables, so that the architecture's own
rotation does nothing and raw keys are cached. After the decoder's forward, :class:`RecordHook` stores the new state on
the cache. :func:`posenc_attention_forward`, registered with transformers by name, hands each layer's call to the step;
a layer that gets no step runs transformers' own attention.

Hooks are instances of classes, not closures, so that a model can be copied and pickled. Continuous batching starts in
``posenc/hf/continuous_batching.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from posenc.errors import UnsupportedModelError
from posenc.hf import continuous_batching as continuous
from posenc.hf.attachment import Attachment
from posenc.hf.cache.state import CacheState, Forward
from posenc.hf.compiled_step import compiled_step
from posenc.hf.layer_call import LayerCall, LayerStep
from posenc.hf.probe.masks import posenc_mask
from posenc.hf.step import Step
from posenc.hf.step_forwarding import FORWARDING_HOOKS
from posenc.hf.stock import register, stock_attention
from posenc.hf.transformers_names import cache_of, output_cache, paged_cache_of
from posenc.hf.unstepped import note_unstepped

IMPLEMENTATIONS = {"sdpa": "posenc", "eager": "posenc_eager"}
"""Names registered with transformers, by the implementation that the unpatched model runs."""

STEP = "posenc_step"
CANDIDATES = "posenc_candidates"
OUTSIDE = (
    "posenc makes plans in Python; only a token decoded on a static cache is traced "
    "(docs/internals/compiled-decoding.md)"
)
"""Why torch.compile breaks its graph in every other forward."""


Function = TypeVar("Function", bound=Callable[..., Any])


def outside_graphs(function: Function) -> Function:
    """Keep torch.compile from tracing a function: it breaks its graph around it."""
    disable: Any = torch.compiler.disable
    untraced: Function = disable(function, reason=OUTSIDE)
    return untraced


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a forward by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:] if args else []
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _hidden_dtype(decoder: Any, kwargs: dict[str, Any]) -> torch.dtype:
    """Return the dtype of the hidden states that enter the layers; the rotary modules make tables of this dtype."""
    embeddings = kwargs.get("inputs_embeds")
    dtype: torch.dtype = decoder.get_input_embeddings().weight.dtype if embeddings is None else embeddings.dtype
    return dtype


def _input_tokens(kwargs: dict[str, Any]) -> Any:
    """Return the token ids of a forward, its embeddings if it has no ids, or None."""
    ids = kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


def _refuse_tracing() -> None:
    tracing: Any = torch.jit.is_tracing  # type: ignore[attr-defined]
    if tracing() or torch.compiler.is_exporting():
        what = "torch.jit.trace" if tracing() else "torch.export"
        raise UnsupportedModelError(
            f"{what} would record the plan of this one length: plans are made in Python, for every length anew, and "
            "cannot be traced or exported. Call handle.remove() and export the unpatched model, or use torch.compile."
        )


class HeadHook:
    """Recognizes the candidate tokens of assisted generation, before the forward of the model with its head.

    ``generate`` with an assistant or prompt lookup passes a cache and one row, and asks for the logits of the last
    token and its candidates (``logits_to_keep = candidates + 1``). Such candidates count as decoded tokens, not as a
    new prompt. Scoring a prompt with ``logits_to_keep`` and no cache is not affected. To score one on a cache, announce
    its length with ``handle.prompt_length``.
    """

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        kwargs = _named(module, args, kwargs)
        keep = kwargs.get("logits_to_keep", 0)
        tokens = _input_tokens(kwargs)
        if cache_of(kwargs) is None or not isinstance(keep, int) or keep < 2 or tokens is None:
            return None
        if tokens.shape[0] != 1 or tokens.shape[1] < keep:
            return None
        return (), {**kwargs, CANDIDATES: keep - 1}


@dataclass
class DecoderHook:
    """Makes the step of a forward from its lengths, padding and cache, before the decoder's forward."""

    attachment: Attachment

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = _named(module, args, kwargs)
        self._check_implementation(module)
        tokens = _input_tokens(kwargs)
        if tokens is None:
            return (), kwargs  # the model itself raises a clear error
        compiling = torch.compiler.is_compiling()
        if compiling and CANDIDATES not in kwargs:
            step = compiled_step(self.attachment, kwargs, tokens)
            if step is not None:
                return (), {**kwargs, STEP: step}
        return (), self._planned(module, kwargs, tokens)

    @outside_graphs
    def _planned(self, module: nn.Module, kwargs: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
        """Return the keyword arguments with a step whose plans are made now."""
        _refuse_tracing()
        forward = Forward.of(self.attachment, kwargs, tokens, candidates=kwargs.pop(CANDIDATES, 0))
        layers = self.attachment.layers(module, forward.position_ids_BL)
        if paged_cache_of(kwargs) is not None:  # continuous batching: many sequences in one row, each with its own mask
            no_mask = tokens.new_ones((1, 1, 1, 1), dtype=torch.bool)
            step = self.attachment.batches.step(layers, kwargs, forward.position_ids_BL)
            return {**kwargs, STEP: step, "attention_mask": no_mask}
        config: Any = module.config
        return kwargs | {
            STEP: Step(
                CacheState.of(forward.cache).begin(forward),
                layers,
                static=any(hasattr(layer, "max_cache_len") for layer in getattr(forward.cache, "layers", ())),
                attentions=bool(kwargs.get("output_attentions", getattr(config, "output_attentions", False))),
                table_dtype=_hidden_dtype(module, kwargs),
                causal=getattr(config, "is_causal", None) is not False,
            )
        }

    def _check_implementation(self, module: nn.Module) -> None:
        config: Any = module.config
        patched = IMPLEMENTATIONS[self.attachment.original]
        if config._attn_implementation == patched:
            return
        if config._attn_implementation == self.attachment.original:
            # a handle was removed from another model with the same config object, which runs stock under either name
            config._attn_implementation_internal = patched
            return
        raise UnsupportedModelError(
            f"the attention implementation was changed to {config._attn_implementation!r} while posenc is applied. "
            "Call handle.remove() first, change it, then apply again."
        )


@dataclass
class RecordHook:
    """Stores the new state on the cache, which the model may have made itself, after the decoder's forward."""

    attachment: Attachment

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        step = kwargs.get(STEP)
        if isinstance(step, Step):
            self._finish(kwargs, step, output, torch.compiler.is_compiling())

    @outside_graphs
    def _finish(self, kwargs: dict[str, Any], step: Step, output: Any, compiling: bool) -> None:
        cache = cache_of(kwargs)
        cache = output_cache(output) if cache is None else cache
        if cache is not None:
            CacheState.of(cache).finish(cache, step.tokens, step.layers, compiling=compiling)


@dataclass
class RotaryHook:
    """Replaces the tables of a rotary module by (ones, zeros), so that the layers do not rotate."""

    attachment: Attachment

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.attachment.adapter_reads_rotary:
            return None
        if isinstance(output, Tensor):  # complex: cos + i sin
            return torch.ones_like(output)
        cos, sin = output
        return torch.ones_like(cos), torch.zeros_like(sin)


HOOKS = (HeadHook, DecoderHook, RecordHook, RotaryHook, *FORWARDING_HOOKS)


def posenc_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    original: str = "sdpa",
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered with transformers.

    It hands the call to the step of the forward; without a step it runs the ``original`` implementation.
    """
    step: LayerStep | None = kwargs.pop(STEP, None)
    if step is None:
        note_unstepped(module)
        return stock_attention(original, module)(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    attend = step.attend
    if torch.compiler.is_compiling() and isinstance(step, Step):
        attend = outside_graphs(attend)
    return attend(LayerCall(module, query, key, value, attention_mask, scaling, dropout, kwargs))


REGISTERED = {name: partial(posenc_attention_forward, original=stock) for stock, name in IMPLEMENTATIONS.items()}
"""The attention functions by the names under which transformers finds them."""


def register_with_transformers() -> None:
    """Add posenc's attention and mask functions to transformers' registries; doing so twice is harmless."""
    for name, function in REGISTERED.items():
        register(name, function, posenc_mask)


def install(model: nn.Module, decoder: nn.Module, attachment: Attachment) -> None:
    """Put the hooks on a model, its decoder and the rotary modules that the probe found."""
    continuous.install(model, attachment)
    if model is not decoder:
        model.register_forward_pre_hook(HeadHook(), with_kwargs=True)
    decoder.register_forward_pre_hook(DecoderHook(attachment), with_kwargs=True)
    decoder.register_forward_hook(RecordHook(attachment), with_kwargs=True)
    for name in attachment.rotaries:
        decoder.get_submodule(name).register_forward_hook(RotaryHook(attachment))


def uninstall(model: nn.Module) -> None:
    """Remove every hook of posenc from a model and its sub-modules."""
    continuous.uninstall(model)
    for module in model.modules():
        for hooks, flags in (
            (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
            (
                module._forward_hooks,
                (module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
            ),
        ):
            for key in [key for key, hook in hooks.items() if isinstance(hook, HOOKS)]:
                del hooks[key]
                for flag in flags:
                    flag.pop(key, None)


def find_attachment(model: nn.Module) -> Attachment | None:
    """Return the attachment of a patched model, or None."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, DecoderHook):
                return hook.attachment
    return None
