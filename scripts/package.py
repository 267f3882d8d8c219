"""Build the sdist and the wheel as they would be published, and try the wheel as a user who installs it today.

    python -m scripts.package

The environment contains only the wheel, its extra ``plot`` and the dependencies that pip finds for them: first the
newest transformers, then the oldest that pyproject.toml accepts. Only torch is pinned, to the version of
constraints.txt, since only some versions have a build for the CPU. The commands and the code of docs/quickstart.md are
run in it unchanged.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.environments import ROOT, Environment, oldest, pinned
from tests.docs.collect import blocks

QUICKSTART = "docs/quickstart.md"
MODEL = Path("posenc") / "models" / "tiny"
MUST_HOLD = (
    "posenc/py.typed",
    "posenc/evaluate/demo.yaml",
    "posenc/display/explore/static/page.css",
    "posenc/display/explore/templates/page.html",
    "posenc/models/tiny/model.safetensors",
    "posenc/cli/_scaffold/plugin/module.py.template",
    "posenc_adapters/families.json",
    "posenc_plugins/lampe.py",
)


def build(into: Path, *kinds: str) -> list[Path]:
    """Build ``sdist``, ``wheel`` or (with neither named) the sdist and a wheel from it."""
    flags = [f"--{kind}" for kind in kinds]
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", *flags, "--outdir", into, ROOT], check=True)
    return sorted(into.iterdir())


def check_installed(environment: Environment, version: str) -> None:
    """Check that the wheel installed its files, and that Python imports them."""
    missing = [name for name in MUST_HOLD if not (environment.home / name).is_file()]
    if missing:
        raise SystemExit(f"the wheel lacks {', '.join(missing)}")
    place = environment.run("-c", "import posenc; print(posenc.__file__)").strip()
    if not place.startswith(str(environment.home)):
        raise SystemExit(f"posenc is imported from {place}, not from the wheel")
    if environment.version("posenc") != version:
        raise SystemExit(f"the archives of {version} contain posenc {environment.version('posenc')}")


def check_doctor(environment: Environment) -> None:
    """Check that ``posenc doctor`` passes and reports the installed versions."""
    report = json.loads(environment.call(environment.posenc, "doctor", "--json"))
    for package in ("posenc", "transformers", "torch"):
        if report["versions"][package] != environment.version(package):
            raise SystemExit(f"posenc doctor sees {package} {report['versions'][package]}")


def follow_quickstart(environment: Environment, folder: Path) -> None:
    """Run its Python as one program and its commands, in a folder with only the model they name from the clone."""
    shutil.copytree(ROOT / MODEL, folder / MODEL)
    page = blocks(QUICKSTART)
    program = folder / "quickstart.py"
    program.write_text("".join(block.code for block in page if block.language == "python"), encoding="utf-8")
    environment.run(program, cwd=folder)
    for command in (line for block in page if block.language == "bash" for line in block.commands):
        words = shlex.split(command)
        if words[0] == "posenc":
            environment.call(environment.posenc, *words[1:], cwd=folder)
        elif words != ["pip", "install", ".[plot]"]:  # the environment was made with this
            raise SystemExit(f"{QUICKSTART}: this script does not know how to run {command!r}")


def main() -> None:
    """Build, check the metadata, install, and follow the quickstart."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        distributions = build(folder / "dist")
        subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *distributions], check=True)
        (version,) = {path.name.removesuffix(".tar.gz").split("-")[1] for path in distributions}
        (wheel,) = (path for path in distributions if path.suffix == ".whl")
        environment, began = Environment(folder / "environment"), time.perf_counter()
        environment.pip("install", f"{wheel}[plot]", pinned("torch"))
        print(f"installed in {time.perf_counter() - began:.0f} s", flush=True)
        check_installed(environment, version)
        for age, wanted in (("newest", None), ("oldest", oldest("transformers"))):
            if wanted is not None:
                environment.pip("install", wanted)
            check_doctor(environment)
            follow_quickstart(environment, folder / age)
            print(f"the wheel works with the {age} transformers, {environment.version('transformers')}", flush=True)
        print(f"posenc {version}: sdist and wheel are valid, and the wheel works in a clean environment")


if __name__ == "__main__":
    main()
