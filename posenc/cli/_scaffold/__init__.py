"""New distributions from templates: ``posenc new plugin`` and ``posenc new adapter``.

A template is a folder of ``FILE.template`` files here. ``$name``, ``$module``, ``$class_name`` and ``$posenc`` are
replaced, and ``module`` in a file name becomes the name of the module.
"""

from __future__ import annotations

import keyword
import os
import re
import shutil
import sys
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Literal

from posenc import __version__
from posenc.errors import InvalidInputError
from posenc.files import expanded
from posenc.plugins import adapters, strategies

Scaffold = Literal["plugin", "adapter"]
"""Name of a template: a distribution with a strategy, or with an adapter."""

FILES = ("pyproject.toml", "README.md", "module.py", "tests/test_module.py")


def create(scaffold: Scaffold, name: str, into: str | Path = ".") -> list[Path]:
    """Write a new distribution into the folder ``into / name``.

    Parameters
    ----------
    scaffold : {"plugin", "adapter"}
        With a strategy, or with an adapter.
    name : str
        Name of the distribution; the names of the module and of the strategy or adapter are derived from it.
    into : str or Path
        The parent folder, which must exist.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    InvalidInputError
        If the name is invalid or taken, or the folder exists or cannot be written. Nothing is left behind.
    """
    contents = rendered(scaffold, _values(scaffold, name))
    parent = expanded(into)
    target = parent / name
    if target.exists():
        raise InvalidInputError(f"{target} exists already. Choose another name, or another folder with --into.")
    if not parent.is_dir():
        raise InvalidInputError(f"{parent}: no such folder to write {name} into.")
    _write_folder(target, contents)
    return [target / file for file in contents]


def _write_folder(target: Path, contents: dict[str, str]) -> None:
    """Write files into a temporary folder, then rename it to `target`, so that no half-written folder is left."""
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        for file, text in contents.items():
            path = temporary / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        os.chmod(temporary, (temporary / "tests").stat().st_mode)  # mkdtemp makes a private folder
        os.rename(temporary, target)
    except OSError as error:
        raise InvalidInputError(f"{target}: cannot be written ({error.strerror or error}).") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def rendered(scaffold: Scaffold, values: dict[str, str]) -> dict[str, str]:
    """Render every file of a template; returns texts by path."""
    folder = files(__name__) / scaffold
    return {
        file.replace("module", values["module"]): Template(
            folder.joinpath(*f"{file}.template".split("/")).read_text(encoding="utf-8")
        ).substitute(values)
        for file in FILES
    }


def _values(scaffold: Scaffold, name: str) -> dict[str, str]:
    """Derive the values that replace the placeholders, and check that the names are free."""
    module = re.sub(r"[-_.]+", "_", name).lower()
    if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?", name) or keyword.iskeyword(module):
        raise InvalidInputError(
            f"{name!r} cannot be the name of a distribution and a module: use letters, digits and hyphens, "
            "beginning with a letter, such as 'my-strategy'."
        )
    if module in sys.stdlib_module_names or find_spec(module) is not None:
        raise InvalidInputError(
            f"{name!r}: there is a module {module!r} already, and a new one would hide it. Choose another name."
        )
    taken = strategies() if scaffold == "plugin" else adapters()
    if module in taken:
        raise InvalidInputError(f"{name!r}: {taken.kind} {module!r} is installed already. Choose another name.")
    class_name = "".join(part.capitalize() for part in module.split("_"))
    version = ".".join(__version__.split(".")[:2])
    return {"name": name, "module": module, "class_name": class_name, "posenc": version}
