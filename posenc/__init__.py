"""posenc: read past the pretraining window of any RoPE language model, without training.

Importing this package loads no plugin and no torch; names arrive when they are first used. No module of
the package has the name of a public function, so importing one cannot hide the other.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posenc import testing as testing
    from posenc.adapter import ArchitectureAdapter
    from posenc.backend import AttentionBackend, BackendCapabilities
    from posenc.checkpoint import rotary_of, window_of
    from posenc.config import Config, load_config
    from posenc.errors import (
        BackendError,
        CacheMismatchError,
        InvalidConfigError,
        InvalidInputError,
        ModelBusyError,
        PluginError,
        PosencError,
        UnknownNameError,
        UnsupportedModelError,
    )
    from posenc.hf.apply import apply
    from posenc.hf.handle import Handle, attached
    from posenc.hf.hub import from_pretrained
    from posenc.hookspecs import hookimpl
    from posenc.kernels.dispatch import attention
    from posenc.params import Capabilities, RemapParams, Retention
    from posenc.plan import PositionPlan
    from posenc.plugins import adapters, backends, strategies, strategy
    from posenc.positions import FrequencyStrategy, PositionStrategy
    from posenc.registry import StrategyInfo
    from posenc.rope import Rotary
    from posenc.segment import Lengths, Segment

__version__ = "0.2.0"

__all__ = [
    "ArchitectureAdapter",
    "AttentionBackend",
    "BackendCapabilities",
    "BackendError",
    "CacheMismatchError",
    "Capabilities",
    "Config",
    "FrequencyStrategy",
    "Handle",
    "InvalidConfigError",
    "InvalidInputError",
    "Lengths",
    "ModelBusyError",
    "PluginError",
    "PosencError",
    "PositionPlan",
    "PositionStrategy",
    "RemapParams",
    "Retention",
    "Rotary",
    "Segment",
    "StrategyInfo",
    "UnknownNameError",
    "UnsupportedModelError",
    "__version__",
    "adapters",
    "apply",
    "attached",
    "attention",
    "backends",
    "from_pretrained",
    "hookimpl",
    "load_config",
    "rotary_of",
    "strategies",
    "strategy",
    "window_of",
]

_HOMES = {
    "adapter": ("ArchitectureAdapter",),
    "backend": ("AttentionBackend", "BackendCapabilities"),
    "checkpoint": ("rotary_of", "window_of"),
    "config": ("Config", "load_config"),
    "kernels.dispatch": ("attention",),
    "errors": (
        "BackendError",
        "CacheMismatchError",
        "InvalidConfigError",
        "InvalidInputError",
        "ModelBusyError",
        "PluginError",
        "PosencError",
        "UnknownNameError",
        "UnsupportedModelError",
    ),
    "hf.apply": ("apply",),
    "hf.handle": ("Handle", "attached"),
    "hookspecs": ("hookimpl",),
    "hf.hub": ("from_pretrained",),
    "plan": ("PositionPlan",),
    "plugins": ("adapters", "backends", "strategies", "strategy"),
    "params": ("Capabilities", "RemapParams", "Retention"),
    "positions": ("FrequencyStrategy", "PositionStrategy"),
    "registry": ("StrategyInfo",),
    "rope": ("Rotary",),
    "segment": ("Lengths", "Segment"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "testing":  # `posenc.testing.StrategyContract` after a bare `import posenc`
        return import_module("posenc.testing")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'posenc' has no attribute {name!r}")
    value = getattr(import_module(f"posenc.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
