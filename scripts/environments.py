"""Virtual environments to try posenc in, and the versions that it supports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILDER = Path(sysconfig.get_path("purelib"))
"""The packages of the environment that runs this. Another environment that adds them to its path does not see the
editable posenc among them: Python looks for .pth files only in the interpreter's own folders."""


class Environment:
    """A virtual environment, created if it does not exist.

    Parameters
    ----------
    folder : Path
        Folder of the environment.
    behind : sequence of Path
        Folders of packages that it searches after its own.
    """

    def __init__(self, folder: Path, behind: Sequence[Path] = ()) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.posenc = folder / "bin" / "posenc"
        self.home = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (self.home / "behind.pth").write_text("".join(f"{path}\n" for path in behind))

    def run(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """Run its Python and return what it prints, or raise an error that contains everything it printed."""
        return self.call(self.python, *arguments, cwd=cwd)

    def call(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a command in a folder outside this repository, with no packages but the environment's."""
        done = subprocess.run(
            command,
            cwd=cwd or self.python.parents[1],
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
        return done.stdout

    def pip(self, *arguments: str | Path) -> None:
        """Run this interpreter's pip on the environment."""
        self.call(sys.executable, "-m", "pip", "--python", self.python, "-q", *arguments)

    def install(self, what: Path) -> None:
        """Install a wheel or a folder, without dependencies and without network."""
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir", what)

    def version(self, package: str) -> str:
        """Return the installed version of a package."""
        return self.run("-c", f"from importlib.metadata import version; print(version({package!r}))").strip()


def oldest(package: str) -> str:
    """Return ``NAME==VERSION``, the oldest version of a package that pyproject.toml accepts."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = (line for line in project["dependencies"] if re.match(rf"{package}\W", line))
    return str(requirement).replace(">=", "==")


def pinned(package: str) -> str:
    """Return ``NAME==VERSION``, the version that development and CI use, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (requirement,) = (line for line in lines if line.startswith(f"{package}=="))
    return requirement
