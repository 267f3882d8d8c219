"""What posenc says: what it chose (``POSENC_TRACE=1``), which versions compute, and loggers held back."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

logger = logging.getLogger("posenc")


def tracing() -> bool:
    """True where :func:`trace` says anything, so that costly messages are made only then."""
    return os.environ.get("POSENC_TRACE") == "1" or logger.isEnabledFor(logging.DEBUG)


def trace(message: str, *values: Any) -> None:
    """Log at DEBUG; with ``POSENC_TRACE=1`` at INFO, or to stderr where the application shows no INFO of ours."""
    if os.environ.get("POSENC_TRACE") != "1":
        logger.debug(message, *values)
    elif logger.isEnabledFor(logging.INFO):
        logger.info(message, *values)
    else:
        print(f"posenc: {message % values}", file=sys.stderr)


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Errors only from the loggers of these names, until the block ends; from posenc's where none is named."""
    loggers = [logging.getLogger(name) for name in names or ("posenc",)]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def versions() -> dict[str, str]:
    """Versions of Python, posenc and what computes for it."""
    names = ("posenc", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
