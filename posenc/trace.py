"""Messages about what posenc chooses (``POSENC_TRACE=1``), quiet loggers, and the versions of what computes."""

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
    """True if :func:`trace` logs or prints; check it before building a costly message."""
    return os.environ.get("POSENC_TRACE") == "1" or logger.isEnabledFor(logging.DEBUG)


def trace(message: str, *values: Any) -> None:
    """Log at DEBUG; with ``POSENC_TRACE=1`` at INFO, or print to stderr if the application shows no INFO messages."""
    if os.environ.get("POSENC_TRACE") != "1":
        logger.debug(message, *values)
    elif logger.isEnabledFor(logging.INFO):
        logger.info(message, *values)
    else:
        print(f"posenc: {message % values}", file=sys.stderr)


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Show only errors of the named loggers (by default posenc's) until the block ends."""
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
    """Versions of Python, posenc and the libraries it computes with."""
    names = ("posenc", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
