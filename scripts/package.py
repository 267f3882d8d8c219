"""Build the sdist and the wheel as they would be published, and try the wheel in a clean environment.

    python -m scripts.package

The environment has posenc from the wheel alone; what posenc needs is read from the environment that runs this, so
nothing is downloaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUST_HOLD = (
    "posenc/py.typed",
    "posenc/evaluate/demo.yaml",
    "posenc/models/tiny/model.safetensors",
    "posenc/scaffold/plugin/module.py.template",
    "posenc_adapters/families.json",
    "posenc_plugins/lampe.py",
)


def build(into: Path, *kinds: str) -> list[Path]:
    """Build ``sdist``, ``wheel`` or (with neither named) the sdist and a wheel from it."""
    flags = [f"--{kind}" for kind in kinds]
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", *flags, "--outdir", into, ROOT], check=True)
    return sorted(into.iterdir())


class CleanEnvironment:
    """A new virtual environment that sees the packages of this one, but not its posenc."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.python = folder / "bin" / "python"
        self.posenc = folder / "bin" / "posenc"
        home = Path(self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        # Only folders of the interpreter's own are searched for .pth files, so the editable posenc stays out.
        (home / "packages-of-the-builder.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.home = home

    def run(self, *arguments: str | Path, cwd: Path | None = None) -> str:
        """Run its Python; what it prints, or an error that holds everything it printed."""
        return self.call(self.python, *arguments, cwd=cwd)

    def call(self, *command: str | Path, cwd: Path | None = None) -> str:
        """Run a command in a folder that is not this repository."""
        done = subprocess.run(
            command, cwd=cwd or self.python.parents[1], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
        return done.stdout

    def pip(self, *arguments: str | Path) -> None:
        """Run this environment's pip on the new one, without network."""
        self.call(sys.executable, "-m", "pip", "--python", self.python, "-q", "--no-cache-dir", *arguments)

    def install(self, what: Path) -> None:
        """Install a wheel or a folder, without dependencies and without network."""
        self.pip("install", "--no-deps", "--no-index", "--no-build-isolation", what)


def main() -> None:
    """Build, check the metadata, install, and run the command line."""
    with tempfile.TemporaryDirectory() as folder:
        made = build(Path(folder) / "dist")
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *made], check=True)
        (wheel,) = (path for path in made if path.suffix == ".whl")
        clean = CleanEnvironment(Path(folder) / "environment")
        clean.install(wheel)
        missing = [name for name in MUST_HOLD if not (clean.home / name).is_file()]
        if missing:
            raise SystemExit(f"the wheel lacks {', '.join(missing)}")
        place = clean.run("-c", "import posenc; print(posenc.__file__)").strip()
        if not place.startswith(str(clean.home)):
            raise SystemExit(f"posenc is imported from {place}, not from the wheel")
        report = json.loads(clean.call(clean.posenc, "doctor", "--json"))
        (version,) = {path.name.removesuffix(".tar.gz").split("-")[1] for path in made}
        if report["versions"]["posenc"] != version:
            raise SystemExit(f"posenc {report['versions']['posenc']} is in the archives of {version}")
        print(f"posenc {version}: sdist and wheel are valid, and the wheel works in a clean environment")


if __name__ == "__main__":
    main()
