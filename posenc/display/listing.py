"""What is installed, as rows of a table: for ``posenc list`` and for notebooks."""

from __future__ import annotations

from typing import Any

from posenc.registry import Registry


def listing(registry: Registry[Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of :func:`posenc.strategies`, :func:`posenc.adapters` or :func:`posenc.backends`."""
    if registry.kind == "adapter":
        columns = ["name", "summary", "serves", "distribution"]
        rows = [[i.name, i.summary, ", ".join(i.capabilities), i.distribution] for i in registry.values()]
    elif registry.kind == "backend":
        columns = ["name", "summary", "devices", "distribution"]
        rows = [[i.name, i.summary, ", ".join(i.capabilities.devices), i.distribution] for i in registry.values()]
    else:
        columns = ["name", "kind", "summary", "paper", "distribution"]
        rows = [[i.name, i.kind, i.summary, i.paper, i.distribution] for i in registry.values()]
    return columns, rows
