"""The notebook's cells run in order, and their last expressions render."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import posenc
from tests.examples.load import EXAMPLES

NOTEBOOK = json.loads((EXAMPLES / "visualise_positions.ipynb").read_text(encoding="utf-8"))


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell like a notebook; return the value of its last line if that is an expression."""
    body = ast.parse(source).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def test_cells_run_and_render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "posenc").symlink_to(EXAMPLES.parent / "posenc")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    results = {
        cell["id"]: run_cell("".join(cell["source"]), names)
        for cell in NOTEBOOK["cells"]
        if cell["cell_type"] == "code"
    }
    shown = {name: value._repr_html_() for name, value in results.items() if hasattr(value, "_repr_html_")}
    assert set(shown) == {"installed", "plan", "leaves", "handle", "handle-plan"}
    assert all("data:image/png;base64," in shown[name] for name in ("plan", "leaves", "handle-plan"))
    assert (tmp_path / "position-maps.png").read_bytes().startswith(b"\x89PNG")
    assert posenc.attached(names["model"]) is None


def test_the_notebook_has_no_outputs() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
