"""New distributions from templates: ``posenc new plugin`` and ``posenc new adapter``.

A template is a folder of ``FILE.template`` here. ``$name``, ``$module``, ``$class_name`` and ``$posenc`` are
filled in, and ``module`` in a file's name becomes the module's.
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

Kind = Literal["plugin", "adapter"]

FILES = ("pyproject.toml", "README.md", "module.py", "tests/test_module.py")


def create(kind: Kind, name: str, into: str | Path = ".") -> list[Path]:
    """Write a new distribution into the folder ``into / name``.

    Parameters
    ----------
    kind : {"plugin", "adapter"}
        With a strategy, or with an adapter.
    name : str
        Name of the distribution; that of the module and of the strategy or adapter follows from it.

    Returns
    -------
    list of Path
        The files written.

    Raises
    ------
    InvalidInputError
        If the name cannot be used, is taken, or the folder exists or cannot be written. Nothing is left behind.
    """
    values = _values(kind, name)
    parent = expanded(into)
    target = parent / name
    if target.exists():
        raise InvalidInputError(f"{target} exists already. Choose another name, or another folder with --into.")
    if not parent.is_dir():
        raise InvalidInputError(f"{parent}: no such folder to write {name} into.")
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=parent))
        for file, text in rendered(kind, values).items():
            path = temporary / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        os.chmod(temporary, (temporary / "tests").stat().st_mode)  # mkdtemp's own is private
        os.rename(temporary, target)
    except OSError as error:
        raise InvalidInputError(f"{target}: cannot be written ({error.strerror or error}).") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return [target / file for file in rendered(kind, values)]


def rendered(kind: Kind, values: dict[str, str]) -> dict[str, str]:
    """The text of every file of a template, by its path."""
    folder = files(__name__) / kind
    return {
        file.replace("module", values["module"]): Template(
            folder.joinpath(*f"{file}.template".split("/")).read_text(encoding="utf-8")
        ).substitute(values)
        for file in FILES
    }


def _values(kind: Kind, name: str) -> dict[str, str]:
    """What the templates are filled in with."""
    module = re.sub(r"[-_.]+", "_", name).lower()
    if not re.fullmatch(r"[A-Za-z]([A-Za-z0-9._-]*[A-Za-z0-9])?", name) or keyword.iskeyword(module):
        raise InvalidInputError(
            f"{name!r} cannot be the name of a distribution and a module: use letters, digits and hyphens, "
            "beginning with a letter, such as 'my-strategy'."
        )
    if module in sys.stdlib_module_names or find_spec(module) is not None:
        raise InvalidInputError(f"{name!r}: there is a module {module!r} already, which a new one would hide.")
    taken = strategies() if kind == "plugin" else adapters()
    if module in taken:
        raise InvalidInputError(f"{name!r}: {taken.kind} {module!r} is installed already. Choose another name.")
    class_name = "".join(part.capitalize() for part in module.split("_"))
    version = ".".join(__version__.split(".")[:2])
    return {"name": name, "module": module, "class_name": class_name, "posenc": version}
