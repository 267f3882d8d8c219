"""Registries: what is registered for a seam by name, and which distribution it comes from."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from posenc.errors import PluginError, UnknownNameError

if TYPE_CHECKING:
    from posenc.adapter import ArchitectureAdapter
    from posenc.backend import AttentionBackend
    from posenc.params import Capabilities
    from posenc.positions import PositionStrategy

T = TypeVar("T")


@dataclass(frozen=True)
class StrategyInfo:
    """A registered strategy and its distribution."""

    name: str
    summary: str
    paper: str
    params: type[Any]
    capabilities: Capabilities
    distribution: str
    factory: type[PositionStrategy]

    @property
    def kind(self) -> str:
        """``"frequencies"`` for strategies that change frequencies, ``"positions"`` for the others."""
        return "frequencies" if self.capabilities.changes_frequencies else "positions"


@dataclass(frozen=True)
class AdapterInfo:
    """A registered adapter and its distribution."""

    name: str
    summary: str
    capabilities: tuple[str, ...]
    distribution: str
    adapter: ArchitectureAdapter


@dataclass(frozen=True)
class BackendInfo:
    """A registered backend and its distribution."""

    name: str
    summary: str
    capabilities: Any
    distribution: str
    backend: AttentionBackend


@dataclass(frozen=True)
class TaskInfo:
    """A registered task of ``posenc eval`` and where it came from."""

    name: str
    summary: str
    metric: str
    settings: tuple[str, ...]
    distribution: str
    factory: type[Any]


class Registry(dict[str, T]):
    """What is registered for one seam by name; an unknown or ambiguous name raises an error with a hint.

    Raises
    ------
    UnknownNameError
        When a name is looked up that is not registered; suggests the nearest one.
    PluginError
        When a name is looked up that several distributions registered.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.failed: list[str] = []
        self._owners: dict[str, list[str]] = {}

    def add(self, name: str, item: T, owner: str) -> None:
        """Add a name; raises PluginError if it is taken, and the name is ambiguous from then on."""
        owners = self._owners.setdefault(name, [])
        owners.append(owner)
        if len(owners) > 1:
            raise PluginError(
                f"{self.kind} {name!r} is already registered by {owners[0]!r}. "
                "Rename one of them, or choose with POSENC_PLUGINS."
            )
        self[name] = item

    def __getitem__(self, name: str) -> T:
        owners = self._owners.get(name, [])
        if len(owners) > 1:
            raise PluginError(
                f"{self.kind} {name!r} is registered by several distributions: {', '.join(owners)}. "
                "Uninstall one, or load only the ones you want with POSENC_PLUGINS (comma list)."
            )
        return super().__getitem__(name)

    def __missing__(self, name: str) -> T:
        nearest = difflib.get_close_matches(str(name), self, n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        message = f"no {self.kind} named {name!r}.{hint} Installed: {', '.join(sorted(self)) or 'none'}."
        if self.failed:
            message += f" Plugins that failed to load: {'; '.join(self.failed)}. See 'posenc plugins'."
        raise UnknownNameError(message)

    def get(self, name: str, default: Any = None) -> Any:
        """The item, or ``default`` for an unknown name; an ambiguous one still raises."""
        if name not in self:
            return default
        return self[name]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows for people: what ``posenc list`` and notebooks show."""
        infos: list[Any] = list(self.values())
        if self.kind == "adapter":
            columns = ["name", "summary", "serves", "distribution"]
            rows = [[info.name, info.summary, ", ".join(info.capabilities), info.distribution] for info in infos]
        elif self.kind == "backend":
            columns = ["name", "summary", "devices", "distribution"]
            rows = [
                [info.name, info.summary, ", ".join(info.capabilities.devices), info.distribution] for info in infos
            ]
        elif self.kind == "task":
            columns = ["name", "summary", "settings", "distribution"]
            rows = [[info.name, info.summary, ", ".join(info.settings), info.distribution] for info in infos]
        else:
            columns = ["name", "kind", "summary", "paper", "distribution"]
            rows = [[info.name, info.kind, info.summary, info.paper, info.distribution] for info in infos]
        return columns, rows

    def _repr_html_(self) -> str:
        html: str = import_module("posenc.display.notebook").table_html(*self.table())  # the core imports no tool
        return html
