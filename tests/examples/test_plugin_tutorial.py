"""The tutorial's plugin has less than 40 lines with its tests, and they pass for a reader."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.examples.load import EXAMPLES, example

TUTORIAL = EXAMPLES / "plugin-tutorial"


def test_the_plugin_has_less_than_forty_lines() -> None:
    files = sorted(TUTORIAL.glob("*.py"))
    assert [file.name for file in files] == ["saturating.py", "test_saturating.py"]
    assert sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files) < 40


def test_the_plugins_own_tests_pass(tmp_path: Path) -> None:
    shutil.copytree(TUTORIAL, tmp_path / "tutorial", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"],
        cwd=tmp_path / "tutorial",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"17 passed", done.stdout), done.stdout


def test_the_segment_of_the_plugin_saturates() -> None:
    saturating = example("plugin-tutorial/saturating").Saturating(window=64, near=16)
    relative = saturating.plan(100_000).max_relative
    assert 60 < relative < 64
    assert saturating.plan(17).relative_positions()[16, 0] == 16
