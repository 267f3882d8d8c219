"""What was found and chosen, for people who ask: ``POSENC_TRACE=1``."""

from __future__ import annotations

import logging
import os
import sys
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
