"""Fake distributions on sys.path, each with one plugin."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from posenc.plugins import discover
from tests.plugins.fakes import Install

counter = itertools.count()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put a distribution with one plugin module on sys.path; undone afterwards."""
    monkeypatch.delenv("POSENC_PLUGINS", raising=False)
    modules: list[str] = []

    def add(source: str, distribution: str = "fake-plugin", entry: str = "{module}", version: str = "1.2") -> str:
        number = next(counter)
        module = f"posenc_fake_{number}"
        folder = tmp_path / str(number)
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(textwrap.dedent(source))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[posenc]\nplugin = {entry.format(module=module)}\n")
        monkeypatch.syspath_prepend(str(folder))
        modules.append(module)
        discover.cache_clear()
        return module

    yield add
    monkeypatch.undo()
    for module in modules:
        sys.modules.pop(module, None)
    discover.cache_clear()
