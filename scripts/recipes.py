"""Run a recipe: the commands of benchmarks/recipes.toml that measure docs/results again.

    python -m scripts.recipes NAME [--dry-run]

``make NAME`` runs the same recipe in .venv.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

from scripts.environments import ROOT

FILE = ROOT / "benchmarks" / "recipes.toml"


class Command(BaseModel):
    """One command of a recipe; the file explains the keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    condition: str | None = Field(default=None, alias="if")
    files: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _from_line(cls, data: Any) -> Any:
        return {"run": data} if isinstance(data, str) else data

    def words(self, root: Path) -> list[str]:
        """The words of the command line, with the files that exist below `root`, each once."""
        paths = (path for pattern in self.files for path in sorted(root.glob(pattern)))
        return [*shlex.split(self.run), *dict.fromkeys(path.relative_to(root).as_posix() for path in paths)]


class Recipe(BaseModel):
    """Commands that run in order, and variables for their environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    commands: tuple[Command, ...]
    environment: dict[str, str] = {}

    def execute(self, root: Path = ROOT) -> int:
        """Run the commands in `root` until one fails, and return its exit status, or 0."""
        folder = Path(sys.executable).parent  # `posenc` and `python` are those of this environment
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **self.environment}

        def call(words: Sequence[str]) -> int:
            print(shlex.join(words), flush=True)
            return subprocess.run(words, cwd=root, env=environment).returncode

        for command in self.commands:
            if command.condition is not None and call(shlex.split(command.condition)) != 0:
                print(f"left out, because that failed: {shlex.join(command.words(root))}", flush=True)
            elif status := call(command.words(root)):
                return status
        return 0

    def script(self, root: Path = ROOT) -> str:
        """The recipe as lines of a shell."""
        lines = [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]
        for command in self.commands:
            line = shlex.join(command.words(root))
            lines.append(line if command.condition is None else f"if {command.condition}; then {line}; fi")
        return "\n".join(lines)


def read(file: Path = FILE) -> dict[str, Recipe]:
    """Read the recipes of a file, by name.

    Raises
    ------
    pydantic.ValidationError
        If a recipe has a key that is not known.
    """
    return TypeAdapter(dict[str, Recipe]).validate_python(tomllib.loads(file.read_text(encoding="utf-8")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or print one recipe, and return its exit status."""
    recipes = read()
    parser = argparse.ArgumentParser(prog="python -m scripts.recipes", description=f"Run a recipe of {FILE.name}.")
    parser.add_argument("name", choices=recipes)
    parser.add_argument("--dry-run", action="store_true", help="print the commands instead")
    options = parser.parse_args(arguments)
    recipe = recipes[options.name]
    if options.dry_run:
        print(recipe.script())
        return 0
    return recipe.execute()


if __name__ == "__main__":
    sys.exit(main())
