"""Small sweeps on the shipped model, and what they leave on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from posenc.evaluate.sweep import run
from posenc.evaluate.sweep.run import PlannedSweep
from posenc.evaluate.sweep.session import Session

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "name": "small",
    "lengths": [24, 40],
    "strategies": ["rope", {"strategy": {"name": "rerope", "window_size": 12}}],
    "tasks": [{"task": "perplexity", "documents": 2, "scored": 8}],
}


def write(folder: Path, suite: dict[str, Any], **changes: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({**suite, **changes}), encoding="utf-8")
    return path


def plan(folder: Path, suite: dict[str, Any], session: Session, out: str = "out", **changes: Any) -> PlannedSweep:
    return run.plan(write(folder, suite, **changes), folder / out, session)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that belongs to a result."""
    files = [folder / "sweep.json", *(folder / "cells").iterdir()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
