"""The harness weighs over 600 MB, so these tests have an environment step of their own: ``make test-lm-eval``.

CI runs it. Where the harness is not installed the folder is left out, and pytest says so.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

INSTALLED = find_spec("lm_eval") is not None
collect_ignore_glob = [] if INSTALLED or os.environ.get("POSENC_TEST_LM_EVAL") else ["test_*.py"]


def pytest_report_header() -> str | None:
    return None if INSTALLED else "tests/lm_eval: left out, lm-evaluation-harness is not installed (make test-lm-eval)"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
