"""scripts.versions without its downloads: which packages it installs where, and what it runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts import versions


class Recorded:
    """In place of an environment: remembers what pip would have installed."""

    installs: list[tuple[str, ...]]

    def __init__(self, folder: Path, behind: Any) -> None:
        self.folder, self.python = folder, folder / "bin" / "python"

    def pip(self, *arguments: str) -> None:
        self.installs.append((self.folder.name, *arguments))

    def version(self, package: str) -> str:
        return "1.0"


@pytest.fixture
def statuses(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit statuses of pytest, to be filled."""
    left: list[int] = []
    monkeypatch.setattr(Recorded, "installs", [], raising=False)
    monkeypatch.setattr(versions, "Environment", Recorded)
    monkeypatch.setattr(versions.subprocess, "run", lambda words, cwd: SimpleNamespace(returncode=left.pop(0)))
    return left


def test_transformers_alone(statuses: list[int]) -> None:
    statuses += [0, 0]
    assert versions.main([]) == 0
    assert Recorded.installs == [
        ("oldest", "install", "--upgrade", "transformers==5.17"),
        ("newest", "install", "--upgrade", "transformers"),
    ]


def test_with_torch(statuses: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    statuses += [0, 0]
    assert versions.main(["--torch"]) == 0
    assert Recorded.installs == [
        ("oldest-torch", "install", "--upgrade", "transformers==5.17", "torch==2.11"),
        ("newest-torch", "install", "--upgrade", "transformers", "torch"),
    ]
    assert capsys.readouterr().out.startswith("oldest: transformers 1.0, torch 1.0\n")


def test_the_first_failure_ends_it(statuses: list[int]) -> None:
    statuses += [1]
    assert versions.main([]) == 1
    assert len(Recorded.installs) == 1
