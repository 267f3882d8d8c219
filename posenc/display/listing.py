"""Installed plugins as rows of a table, for ``posenc list`` and for notebooks."""

from __future__ import annotations

from typing import Any

from posenc.registry import Registry


def listing(registry: Registry[Any]) -> tuple[list[str], list[list[str]]]:
    """Make columns and rows for a registry of :mod:`posenc.plugins`: strategies, adapters, backends or tasks."""
    infos = list(registry.values())
    if registry.kind == "adapter":
        columns = ["name", "summary", "serves", "distribution"]
        rows = [[info.name, info.summary, ", ".join(info.capabilities), info.distribution] for info in infos]
    elif registry.kind == "backend":
        columns = ["name", "summary", "devices", "distribution"]
        rows = [[info.name, info.summary, ", ".join(info.capabilities.devices), info.distribution] for info in infos]
    elif registry.kind == "task":
        columns = ["name", "summary", "settings", "distribution"]
        rows = [[info.name, info.summary, ", ".join(info.settings), info.distribution] for info in infos]
    else:
        columns = ["name", "kind", "summary", "paper", "distribution"]
        rows = [[info.name, info.kind, info.summary, info.paper, info.distribution] for info in infos]
    return columns, rows
