"""Run tests/versions with the oldest and the newest transformers that posenc supports.

    python -m scripts.versions

The newest is what pip finds today, whatever constraints.txt says. Everything else comes from the environment that
runs this, behind the one transformers that each environment has of its own; both are kept in .venv for the next run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from scripts.environments import BUILDER, ROOT, Environment, oldest

FOLDER = Path(sys.prefix) / "versions"
TESTS = ("tests/versions", "--confcutdir", "tests/versions", "-p", "no:cacheprovider")


def main() -> None:
    """Install and test; the first failure ends it with pytest's exit status."""
    for name, wanted in (("oldest", oldest("transformers")), ("newest", "transformers")):
        environment = Environment(FOLDER / name, behind=(BUILDER, ROOT, ROOT / "plugins", ROOT / "adapters"))
        environment.pip("install", "--upgrade", wanted)
        print(f"{name} transformers: {environment.version('transformers')}", flush=True)
        done = subprocess.run([environment.python, "-m", "pytest", *TESTS], cwd=ROOT)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    main()
