"""Run tests/versions with the oldest and the newest transformers that posenc supports.

    python -m scripts.versions [--torch]

The newest is what pip finds today, whatever constraints.txt says. With ``--torch`` the oldest and the newest torch
are installed with them; without it, the installed torch runs both. Everything else comes from the environment that
runs this, behind the packages that each environment has of its own; all are kept in .venv for the next run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.environments import BUILDER, ROOT, Environment, oldest

FOLDER = Path(sys.prefix) / "versions"
TESTS = ("tests/versions", "--confcutdir", "tests/versions", "-p", "no:cacheprovider")


def main(arguments: Sequence[str] | None = None) -> int:
    """Install and test; the exit status of pytest's first failure, or 0."""
    parser = argparse.ArgumentParser(prog="python -m scripts.versions", description="Run tests/versions.")
    parser.add_argument("--torch", action="store_true", help="with the oldest and the newest torch as well")
    packages = ["transformers", "torch"] if parser.parse_args(arguments).torch else ["transformers"]
    for age, wanted in (("oldest", list(map(oldest, packages))), ("newest", packages)):
        environment = Environment(
            FOLDER / "-".join([age, *packages[1:]]), behind=(BUILDER, ROOT, ROOT / "plugins", ROOT / "adapters")
        )
        environment.pip("install", "--upgrade", *wanted)
        print(f"{age}: " + ", ".join(f"{name} {environment.version(name)}" for name in packages), flush=True)
        done = subprocess.run([environment.python, "-m", "pytest", *TESTS], cwd=ROOT)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
