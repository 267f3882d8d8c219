"""The command line: ``posenc VERB``. Each verb is one file here, and a new file is a new verb."""

from __future__ import annotations

from posenc.cli._group import main

__all__ = ["main"]
