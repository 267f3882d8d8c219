"""Forward the step to attention modules whose decoder layer drops keyword arguments (Nemotron, StableLM).

The step of a forward travels down as a keyword argument. Where a layer does not hand it on, hooks on the layers above
the attention module note the step, and a hook on the module takes it from there. A compiled step is noted on the cache,
which both hooks see. Gradient checkpointing may run such a layer again without its hooks; the module then raises an
error. The probe finds these modules and installs the hooks (``posenc/hf/probe/probe.py``).
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
    """Notes the step that a layer was called with, before the layer's forward.

    Parameters
    ----------
    name : str
        Name of the keyword argument that holds the step.
    """

    name: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = kwargs.get(self.name)
        if isinstance(step, CompiledStep):
            CacheState.of(cache_of(kwargs)).step = step
        elif step is not None:
            _step.set(step)


class ForgetStep:
    """Forgets the noted step after the layer's forward, also if it raised an error."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            _step.set(None)


@dataclass
class TakeStep:
    """Adds the noted step to the keyword arguments of an attention module, as if the layer had handed it on.

    Parameters
    ----------
    name : str
        Name of the keyword argument that holds the step.

    Raises
    ------
    UnsupportedModelError
        If no step was noted: the module was called outside its decoder, or without the hooks of its layer.
    """

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
            return None  # the probe refuses the model with a clearer reason
        if step is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} was called outside its decoder while posenc is applied: it has no positions. "
                "If gradient checkpointing is on, turn it off: it runs such layers again without their hooks."
            )
        return args, {**kwargs, self.name: step}


FORWARDING_HOOKS = (NoteStep, ForgetStep, TakeStep)


def install_step_forwarding(decoder: nn.Module, modules: list[nn.Module], name: str) -> None:
    """Put the hooks on attention modules of a decoder and on every module above them.

    Parameters
    ----------
    decoder : Module
        The decoder.
    modules : list of Module
        Its attention modules that no step reaches.
    name : str
        Name of the keyword argument that holds the step.
    """
    paths = {part: path for path, part in decoder.named_modules()}
    layers: dict[nn.Module, None] = {}
    for module in modules:
        module.register_forward_pre_hook(TakeStep(name), with_kwargs=True)
        names = paths[module].split(".")
        layers |= {decoder.get_submodule(".".join(names[:depth])): None for depth in range(1, len(names))}
    for layer in layers:
        layer.register_forward_pre_hook(NoteStep(name), with_kwargs=True)
        layer.register_forward_hook(ForgetStep(), always_call=True)
