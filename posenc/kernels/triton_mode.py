"""Whether Triton interprets kernels in this process: decided by the environment, before Triton is imported."""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
"""Triton's interpreter runs kernels on the CPU, slowly: it proves them right. Read once, and as Triton does."""
