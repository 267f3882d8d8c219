"""The harness takes over 600 MB, so these tests have a step of their own, which CI runs: ``make test-lm-eval``.

Elsewhere the folder is skipped if the harness is not installed, and the end of the run says so (tests/conftest.py).
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

WANTED = "POSENC_TEST_LM_EVAL" in os.environ
collect_ignore_glob = [] if WANTED or find_spec("lm_eval") is not None else ["test_*.py"]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
