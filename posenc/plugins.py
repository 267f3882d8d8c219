"""Discovery: built-in and third-party plugins are both found through entry points.

A broken plugin is recorded and never breaks another one. A name that two distributions register stays listed, and
looking it up raises, because it would be unclear which code ran.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from posenc import hookspecs
from posenc.errors import InvalidConfigError, PluginError
from posenc.hookspecs import GROUP
from posenc.registry import AdapterInfo, BackendInfo, Registry, StrategyInfo, TaskInfo
from posenc.trace import trace

if TYPE_CHECKING:
    from posenc.positions import PositionStrategy

OWN_DISTRIBUTION = "posenc"
RESERVED = ("self", "model", "strategy", "name", "params", "frequencies", "backend", "cache", "window")
"""Names that no parameter of a strategy may have, because ``apply``, ``strategy`` and configurations use them."""
logger = logging.getLogger("posenc")


@dataclass(frozen=True)
class PluginRecord:
    """One entry point: what it registered, how long that took in seconds, and what failed."""

    name: str
    module: str
    distribution: str
    version: str
    seconds: float = 0.0
    failures: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_texts(kind: str, item: Any, keys: tuple[str, ...]) -> None:
    """Raise PluginError unless these attributes, which tables show, are text."""
    missing = [key for key in keys if not _is_text(getattr(item, key, None))]
    if missing:
        name = item.__name__ if isinstance(item, type) else type(item).__name__
        raise PluginError(f"{kind} {name} lacks: {', '.join(missing)} (each must be a text that is not empty).")


def strategy_info(factory: Any, distribution: str) -> StrategyInfo:
    """Describe a strategy class; raises PluginError if it cannot be registered as one."""
    from posenc.params import Capabilities, Params
    from posenc.positions import PositionStrategy

    if not (isinstance(factory, type) and issubclass(factory, PositionStrategy)):
        raise PluginError(f"register() got {factory!r}, not a subclass of posenc.PositionStrategy.")
    _check_texts("strategy class", factory, ("name", "summary", "paper"))
    if not (isinstance(factory.Params, type) and issubclass(factory.Params, Params)):
        raise PluginError(f"strategy {factory.name!r}: Params must be a subclass of posenc.params.Params.")
    if not isinstance(factory.capabilities, Capabilities):
        raise PluginError(f"strategy {factory.name!r}: capabilities must be a posenc.Capabilities.")
    fields = factory.Params.model_fields
    taken = sorted({*fields, *(field.alias for field in fields.values() if field.alias)} & set(RESERVED))
    if taken:
        raise PluginError(
            f"strategy {factory.name!r}: its parameters {', '.join(taken)} have names that posenc.apply, "
            "posenc.strategy and configurations use for something else. Rename them."
        )
    if inspect.isabstract(factory):
        todo = ", ".join(sorted(factory.__abstractmethods__))
        raise PluginError(f"strategy {factory.name!r} does not implement: {todo}.")
    return StrategyInfo(
        factory.name, factory.summary, factory.paper, factory.Params, factory.capabilities, distribution, factory
    )


def adapter_info(adapter: Any, distribution: str) -> AdapterInfo:
    """Describe an adapter; raises PluginError if it cannot be registered as one."""
    from posenc.adapter import ArchitectureAdapter

    if not isinstance(adapter, ArchitectureAdapter):
        raise PluginError(f"register() got {adapter!r}, not an instance of posenc.ArchitectureAdapter.")
    _check_texts("adapter", adapter, ("name", "summary"))
    types = adapter.model_types
    if not (isinstance(types, tuple) and types and all(map(_is_text, types))):
        raise PluginError(f"adapter {adapter.name!r}: model_types must be a tuple of names, got {types!r}.")
    return AdapterInfo(adapter.name, adapter.summary, adapter.model_types, distribution, adapter)


def backend_info(backend: Any, distribution: str) -> BackendInfo:
    """Describe a backend; raises PluginError if it cannot be registered as one."""
    from posenc.backend import AttentionBackend, BackendCapabilities

    if not isinstance(backend, AttentionBackend):
        raise PluginError(f"register() got {backend!r}, not an instance of posenc.AttentionBackend.")
    _check_texts("backend", backend, ("name", "summary"))
    if not isinstance(getattr(backend, "capabilities", None), BackendCapabilities):
        raise PluginError(f"backend {backend.name!r}: capabilities must be a posenc.BackendCapabilities.")
    if not isinstance(backend.priority, int):
        raise PluginError(f"backend {backend.name!r}: priority must be a whole number, got {backend.priority!r}.")
    return BackendInfo(backend.name, backend.summary, backend.capabilities, distribution, backend)


def task_info(factory: Any, distribution: str) -> TaskInfo:
    """Describe a task class; raises PluginError when it is not one."""
    if not _is_task(factory):
        raise PluginError(f"register() got {factory!r}, not a subclass of posenc.evaluate.tasks.base.Task.")
    _check_texts("task class", factory, ("name", "summary"))
    if factory.metric not in ("loss", "accuracy"):
        raise PluginError(f"task {factory.name!r}: metric must be 'loss' or 'accuracy', got {factory.metric!r}.")
    if "task" in factory.model_fields:
        raise PluginError(f"task {factory.name!r}: its setting 'task' has the name of a suite's own key. Rename it.")
    if inspect.isabstract(factory):
        todo = ", ".join(sorted(factory.__abstractmethods__))
        raise PluginError(f"task {factory.name!r} does not implement: {todo}.")
    return TaskInfo(factory.name, factory.summary, factory.metric, tuple(factory.model_fields), distribution, factory)


def _is_task(factory: Any) -> bool:
    """Whether it has the shape of a task: the core does not import the tools, where tasks are defined."""
    from pydantic import BaseModel

    shape = ("check", "measure", "fitted", "settings")
    return (
        isinstance(factory, type)
        and issubclass(factory, BaseModel)
        and all(callable(getattr(factory, method, None)) for method in shape)
    )


HOOKS: dict[str, tuple[str, Callable[[Any, str], Any]]] = {
    "posenc_register_strategies": ("strategy", strategy_info),
    "posenc_register_adapters": ("adapter", adapter_info),
    "posenc_register_backends": ("backend", backend_info),
    "posenc_register_tasks": ("task", task_info),
}


def _is_selected(distribution: str) -> bool:
    """False for a third-party distribution that ``POSENC_PLUGINS`` is set and does not list."""
    selection = os.environ.get("POSENC_PLUGINS")
    if distribution == OWN_DISTRIBUTION or selection is None:
        return True
    return _normalized(distribution) in {_normalized(name) for name in selection.split(",")}


def _normalized(distribution: str) -> str:
    """The spelling of a distribution's name that pip compares."""
    return re.sub(r"[-_.]+", "-", distribution.strip()).lower()


def _entry_points() -> list[EntryPoint]:
    def order(point: EntryPoint) -> tuple[bool, str, str]:
        distribution = point.dist.name if point.dist else ""
        return distribution != OWN_DISTRIBUTION, distribution, point.name

    return sorted(set(entry_points(group=GROUP)), key=order)


@dataclass
class _Plugin:
    """An entry point, and what has happened to it so far."""

    point: EntryPoint
    module: Any = None
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    provides: list[str] = field(default_factory=list)

    @property
    def distribution(self) -> str:
        return self.point.dist.name if self.point.dist else "unknown"

    def record(self) -> PluginRecord:
        version = self.point.dist.version if self.point.dist else ""
        return PluginRecord(
            self.point.name,
            self.point.value,
            self.distribution,
            version,
            self.seconds,
            tuple(self.failures),
            tuple(self.provides),
        )

    def load(self) -> None:
        """Import the module and check its hooks; failures are recorded, not raised."""
        manager = pluggy.PluginManager(GROUP)  # one manager per plugin, so that none can affect another
        manager.add_hookspecs(hookspecs)
        start = time.perf_counter()
        try:
            module = self.point.load()
            manager.register(module)
            if not any(callable(getattr(module, hook, None)) for hook in HOOKS):
                raise PluginError(f"{self.point.value} defines none of the hooks {', '.join(HOOKS)}.")
            self.module = module
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self.fail(f"{type(error).__name__}: {error}")
        self.seconds += time.perf_counter() - start

    def call(self, hook: str, registry: Registry[Any]) -> None:
        """Let the plugin register what it offers for one seam."""
        _, describe = HOOKS[hook]

        def register(item: Any) -> None:
            try:
                info = describe(item, self.distribution)
                registry.add(info.name, info, self.distribution)
                self.provides.append(f"{registry.kind} {info.name}")
            except PluginError as error:
                self.fail(str(error))

        start = time.perf_counter()
        try:
            getattr(self.module, hook)(register)
        except Exception as error:
            self.fail(f"{hook}: {type(error).__name__}: {error}")
        self.seconds += time.perf_counter() - start

    def fail(self, reason: str) -> None:
        """Record a failure, and warn of it."""
        self.failures.append(reason)
        logger.warning("plugin %s (%s): %s", self.point.name, self.distribution, reason)


class Discovery:
    """All plugins: modules are imported here, the hooks of a seam are called when its registry is first needed."""

    def __init__(self) -> None:
        plugins = (_Plugin(point) for point in _entry_points())
        self._plugins = [plugin for plugin in plugins if _is_selected(plugin.distribution)]
        self._registries: dict[str, Registry[Any]] = {}
        for plugin in self._plugins:
            plugin.load()

    def registry(self, hook: str) -> Registry[Any]:
        """What all plugins register through one hook."""
        if hook not in self._registries:
            kind, _ = HOOKS[hook]
            registry: Registry[Any] = Registry(kind)
            for plugin in self._plugins:
                if callable(getattr(plugin.module, hook, None)):
                    plugin.call(hook, registry)
                registry.failed += [f"{plugin.point.name} ({reason})" for reason in plugin.failures]
            trace("%s plugins: %s", kind, ", ".join(registry))
            self._registries[hook] = registry
        return self._registries[hook]

    def records(self) -> list[PluginRecord]:
        """One record per entry point, after the hooks of all seams were called."""
        for hook in HOOKS:
            self.registry(hook)
        return [plugin.record() for plugin in self._plugins]


@cache
def discover() -> Discovery:
    """Find and load every plugin, once per process."""
    return Discovery()


def strategies() -> Registry[StrategyInfo]:
    """Every registered strategy by name, built-in and third-party."""
    return discover().registry("posenc_register_strategies")


def adapters() -> Registry[AdapterInfo]:
    """Every registered architecture adapter by name."""
    return discover().registry("posenc_register_adapters")


def backends() -> Registry[BackendInfo]:
    """Every registered attention backend by name."""
    return discover().registry("posenc_register_backends")


def tasks() -> Registry[TaskInfo]:
    """Every registered task of ``posenc eval`` by name."""
    return discover().registry("posenc_register_tasks")


def plugin_records() -> list[PluginRecord]:
    """A record of every entry point, with its failures."""
    return discover().records()


def strategy(name: str, *, window: int | None = None, **params: Any) -> PositionStrategy:
    """Make a strategy by name.

    Parameters
    ----------
    name : str
        A name from :func:`strategies`.
    window : int, optional
        Pretraining window of the model in tokens.
    **params
        The strategy's own parameters.

    Raises
    ------
    UnknownNameError
        If no such strategy is installed; suggests the nearest name.
    InvalidConfigError
        If a parameter is unknown or out of range; names the key path.
    """
    info = strategies()[name]
    if "self" in params:  # Python itself would refuse this key, without a key path
        raise InvalidConfigError(f"{name}.self: no such key. Known keys: {', '.join(info.params.model_fields)}.")
    return info.factory(window=window, **params)
