"""posenc: read past the pretraining window of any RoPE language model, without training.

Importing this package loads no plugin and no torch; names arrive when they are first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posenc.adapter import ArchitectureAdapter
    from posenc.apply import Handle, apply, attached
    from posenc.backend import AttentionBackend, BackendCapabilities
    from posenc.config import Config, load_config
    from posenc.dispatch import attention
    from posenc.errors import (
        BackendError,
        CacheMismatchError,
        InvalidConfigError,
        InvalidInputError,
        PluginError,
        PosencError,
        UnknownNameError,
        UnsupportedModelError,
    )
    from posenc.hookspecs import hookimpl
    from posenc.hub import from_pretrained
    from posenc.plan import Lengths, PositionPlan, Segment
    from posenc.plugins import StrategyInfo, adapters, backends, strategies, strategy
    from posenc.rope import Rotary
    from posenc.strategy import Capabilities, FrequencyStrategy, PositionStrategy, RemapParams

__version__ = "0.1.0"

_HOMES = {
    "adapter": ("ArchitectureAdapter",),
    "apply": ("Handle", "apply", "attached"),
    "backend": ("AttentionBackend", "BackendCapabilities"),
    "config": ("Config", "load_config"),
    "dispatch": ("attention",),
    "errors": (
        "BackendError",
        "CacheMismatchError",
        "InvalidConfigError",
        "InvalidInputError",
        "PluginError",
        "PosencError",
        "UnknownNameError",
        "UnsupportedModelError",
    ),
    "hookspecs": ("hookimpl",),
    "hub": ("from_pretrained",),
    "plan": ("Lengths", "PositionPlan", "Segment"),
    "plugins": ("StrategyInfo", "adapters", "backends", "strategies", "strategy"),
    "rope": ("Rotary",),
    "strategy": ("Capabilities", "FrequencyStrategy", "PositionStrategy", "RemapParams"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'posenc' has no attribute {name!r}")
    value = getattr(import_module(f"posenc.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the import system from hiding ``posenc.strategy()`` and ``posenc.apply()`` behind their modules."""
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
