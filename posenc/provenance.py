"""What a measured number may depend on besides its own settings."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Versions of Python, posenc and what computes for it."""
    names = ("posenc", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
