"""Settings of the whole suite: one torch thread (tests run side by side), no network, quiet hypothesis."""

from __future__ import annotations

import gc
import os
from importlib.util import find_spec

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import HealthCheck, settings

if find_spec("triton") and not torch.cuda.is_available():  # before triton is imported: interpret its kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
settings.register_profile("posenc", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("posenc")


def pytest_collection_finish() -> None:
    """Exempt objects that live until the end from garbage collection: torch, transformers and the tests themselves."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report what was left out."""
    if find_spec("lm_eval") is None:
        terminalreporter.write_line(
            "left out: tests/lm_eval, lm-evaluation-harness is not installed (make test-lm-eval)"
        )
