"""Handing the step down where a decoder layer drops keyword arguments (Nemotron, StableLM).

The layers above such an attention module note the step they are given, and the module takes it from there; a
compiled step is noted on its cache, which both of them see. Gradient checkpointing runs a layer again without
its hooks; such a module then refuses to guess.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from posenc.errors import UnsupportedModelError
from posenc.hf.cache.state import CacheState
from posenc.hf.compiled_step import CompiledStep
from posenc.hf.transformers_names import cache_of
from posenc.hf.unstepped import probing

_step: ContextVar[Any] = ContextVar("posenc_step", default=None)


@dataclass
class NoteStep:
    """On a layer: remember the step that it was called with."""

    name: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = kwargs.get(self.name)
        if isinstance(step, CompiledStep):
            CacheState.of(cache_of(kwargs)).step = step
        elif step is not None:
            _step.set(step)


class ForgetStep:
    """After the layer, also when it raised: nothing stays behind."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            _step.set(None)


@dataclass
class TakeStep:
    """On the attention module: the step, as if the layer had handed it down."""

    name: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.name in kwargs:
            return None
        state = CacheState.of(cache_of(kwargs))
        if state.step is not None:
            step, state.step = state.step, None
            return args, {**kwargs, self.name: step}
        step = _step.get()
        if step is None and probing():
            return None  # noted as unstepped, and refused with that reason
        if step is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} was called outside its decoder while posenc is applied: it has no positions. "
                "If gradient checkpointing is on, switch it off: it runs such layers again without their hooks."
            )
        return args, {**kwargs, self.name: step}


FORWARDING_HOOKS = (NoteStep, ForgetStep, TakeStep)


def install_step_forwarding(decoder: nn.Module, modules: list[nn.Module], name: str) -> None:
    """Put the hooks on these attention modules and on every layer above them."""
    paths = {part: path for path, part in decoder.named_modules()}
    above: dict[nn.Module, None] = {}
    for module in modules:
        module.register_forward_pre_hook(TakeStep(name), with_kwargs=True)
        parents = paths[module].split(".")
        above |= {decoder.get_submodule(".".join(parents[:depth])): None for depth in range(1, len(parents))}
    for layer in above:
        layer.register_forward_pre_hook(NoteStep(name), with_kwargs=True)
        layer.register_forward_hook(ForgetStep(), always_call=True)
