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
    from posenc.dispatch import attention
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
    from posenc.handle import Handle, apply, attached
    from posenc.hookspecs import hookimpl
    from posenc.hub import from_pretrained
    from posenc.plan import Lengths, PositionPlan, Segment
    from posenc.plugins import StrategyInfo, adapters, backends, strategies, strategy
    from posenc.positions import Capabilities, FrequencyStrategy, PositionStrategy, RemapParams, Retention
    from posenc.rope import Rotary

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
    "dispatch": ("attention",),
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
    "handle": ("Handle", "apply", "attached"),
    "hookspecs": ("hookimpl",),
    "hub": ("from_pretrained",),
    "plan": ("Lengths", "PositionPlan", "Segment"),
    "plugins": ("StrategyInfo", "adapters", "backends", "strategies", "strategy"),
    "positions": ("Capabilities", "FrequencyStrategy", "PositionStrategy", "RemapParams", "Retention"),
    "rope": ("Rotary",),
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
