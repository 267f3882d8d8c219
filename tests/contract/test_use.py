"""The suite as a third party runs it, with plain pytest; tests/docs runs the examples of the pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.collect import blocks

DOCS = Path(__file__).parents[2] / "docs"


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for block in blocks("docs/write-a-strategy.md"):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.code)
    return tmp_path


def test_a_mistake_is_explained_in_words(project: Path) -> None:
    source = (project / "halved.py").read_text()
    (project / "halved.py").write_text(source.replace("lengths.total, near, None", "lengths.total, near - 1, None"))
    done = run_pytest(project, "test_halved.py", "-k", "partition")
    assert done.returncode == 1
    shown = (DOCS / "testing.md").read_text(encoding="utf-8").split("```text\n")[1].splitlines()[0]
    pattern = re.sub(r"\d+", r"\\d+", re.escape(shown))
    assert re.search(pattern, done.stdout), done.stdout


@pytest.mark.parametrize("missing", ["hypothesis", "pytest"])
def test_a_missing_package_is_named(missing: str) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; import posenc; posenc.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"posenc.testing needs pytest and hypothesis, and {missing!r} is not installed" in done.stderr
    assert "pip install 'posenc[testing]'" in done.stderr


def test_importing_posenc_does_not_load_the_suite() -> None:
    code = "import sys, posenc; posenc.strategies(); assert not {'hypothesis', 'pytest'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
