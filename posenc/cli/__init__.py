"""The command line: ``posenc VERB``. A verb is one file here; add a file, and the verb exists."""

from __future__ import annotations

from posenc.cli._group import main

__all__ = ["main"]
