"""Paths on the command line, and options that take one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class FilePath(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """A path; ``~`` is expanded here too, because shells do not expand it after ``--out=``."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from posenc.files import expanded  # imports YAML, which --help must not wait for

        return expanded(value)


text_option = click.option("--text", "source", default="pydoc", show_default=True, help="A UTF-8 file, or 'pydoc'.")
bundle_option = click.option(
    "--bundle", type=FilePath(), metavar="FILE.json", help="Also write all results to this one file."
)
