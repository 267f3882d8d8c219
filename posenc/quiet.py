"""Warnings held back while what they say is part of the answer already."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
