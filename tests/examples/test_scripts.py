"""Every example that is a script runs, using public names only."""

from __future__ import annotations

import re
import runpy

import pytest

import posenc
from tests.examples.load import EXAMPLES

SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_script_runs(script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert f"python examples/{script.name}" in script.read_text(encoding="utf-8")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_the_script_uses_public_names_only(script) -> None:
    source = script.read_text(encoding="utf-8")
    assert "from posenc" not in source
    used = set(re.findall(r"\bposenc\.(\w+)", source))
    assert used <= {*posenc.__all__, "testing"}
