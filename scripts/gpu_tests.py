"""The correctness tests of every backend on the device at hand, side by side in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from scripts.gpu_site import ROOT

if TYPE_CHECKING:
    from posenc.bench.results import Check

TESTS = ("tests/contract/test_backends.py", "tests/devices")
PROCESSES = 4
"""pytest's own, per backend, where pytest-xdist is there."""


def check(names: tuple[str, ...], device: str, seconds: float, folder: Path) -> list[Check]:
    """What the tests of every backend gave; those that still run after ``seconds`` are stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    started = {}
    for name in names:
        report, log = folder / f"tests-{name}.xml", folder / f"tests-{name}.log"
        report.unlink(missing_ok=True)
        options = ["-k", f"[{name}", f"--junitxml={report}", "-p", "no:cacheprovider"]
        if find_spec("xdist") and device == "cuda":
            options += ["-n", str(PROCESSES)]
        with log.open("w") as file:
            started[name] = subprocess.Popen(
                [sys.executable, "-m", "pytest", *TESTS, *options],
                cwd=ROOT,
                env={**os.environ, "POSENC_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
    ends = time.monotonic() + seconds
    found = []
    try:
        for name, process in started.items():
            problem = None
            try:
                process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                problem = f"the tests were stopped after {seconds:.0f} s"
                process.kill()
                process.wait()
            found.append(verdict(name, folder / f"tests-{name}.xml", problem))
    finally:
        for process in started.values():
            process.kill()  # interrupted: no test outlives this
    return found


def verdict(name: str, report: Path, problem: str | None) -> Check:
    """What pytest's report says of a backend."""
    from posenc.bench.results import Check

    try:
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError, StopIteration):
        problem = problem or f"pytest left no report: see tests-{name}.log"
        return Check(backend=name, passed=0, failed=0, skipped=0, problem=problem)
    tests, failed, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    failed += errors
    return Check(backend=name, passed=tests - failed - skipped, failed=failed, skipped=skipped, problem=problem)
