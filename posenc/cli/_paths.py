"""Paths on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class FilePath(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A path; ``~`` is expanded here as well, since shells leave it alone after ``--out=``."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from posenc.files import expanded

        return expanded(value)
