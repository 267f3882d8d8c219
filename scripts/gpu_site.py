"""Make posenc and the packages that a GPU machine lacks importable: this checkout, and the wheels carried there.

    python3 -m scripts.gpu_site    # install .wheels/*.whl (make gpu-wheels) into out/gpu/site, without network

Every GPU script calls ``prepare``, so that none needs make or a PYTHONPATH.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SITE = ROOT / "out" / "gpu" / "site"
WHEELS = ROOT / ".wheels"


def main(arguments: list[str] | None = None) -> int:
    """Install the carried wheels."""
    parse(arguments)
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if not wheels:
        print(f"gpu_site: no wheels in {WHEELS}. Run 'make gpu-wheels' on a machine with network.", file=sys.stderr)
        return 2
    options = ("--quiet", "--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(SITE))
    status = subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels]).returncode
    print(f"gpu_site: {len(wheels)} wheels {'installed' if status == 0 else 'NOT installed'}")
    return status


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, which has no options."""
    description = (__doc__ or "").splitlines()[0]
    return argparse.ArgumentParser(prog="python3 -m scripts.gpu_site", description=description).parse_args(arguments)


def prepare() -> None:
    """Make posenc importable in this process and in every process it starts."""
    paths = [str(ROOT), str(ROOT / "plugins"), str(ROOT / "adapters"), *([str(SITE)] if SITE.exists() else [])]
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys((*paths, *given)))
    sys.path[:] = dict.fromkeys((*paths, *sys.path))  # this checkout before the wheel that was made of it


if __name__ == "__main__":
    sys.exit(main())
