"""The correctness tests of every backend on the device at hand, side by side in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from scripts.gpu_site import ROOT

if TYPE_CHECKING:
    from posenc.bench.results import Check

TESTS = ("tests/contract/test_backends.py", "tests/devices")
MERCY = 8.0
"""Seconds in which pytest must report after it was told to stop."""

PROCESSES = 4
"""pytest's own, per backend, where pytest-xdist is there."""


def check(names: tuple[str, ...], device: str, seconds: float, folder: Path, only: str = "") -> list[Check]:
    """What the tests of every backend gave; those that still run after ``seconds`` are stopped.

    Parameters
    ----------
    only : str
        Only tests whose names hold it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = {}
    for name in names:
        report, log = folder / f"tests-{name}.xml", folder / f"tests-{name}.log"
        report.unlink(missing_ok=True)
        words = f"[{name} and {only}" if only else f"[{name}"
        options = ["-k", words, f"--junitxml={report}", "-p", "no:cacheprovider"]
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
    stopped = set()
    try:
        for name, process in started.items():
            try:
                process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                stopped.add(name)
                process.send_signal(signal.SIGINT)  # pytest then reports what has run
        for name in stopped:
            with suppress(subprocess.TimeoutExpired):
                started[name].wait(MERCY)
    finally:
        for process in started.values():
            process.kill()  # interrupted, or deaf: no test outlives this
            process.wait()
    return [verdict(name, folder / f"tests-{name}.xml", seconds if name in stopped else None) for name in started]


def verdict(name: str, report: Path, stopped_after: float | None) -> Check:
    """What pytest's report says of a backend."""
    from posenc.bench.results import Check

    try:
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError, StopIteration):
        problem = f"pytest left no report: see tests-{name}.log"
        return Check(backend=name, passed=0, failed=0, skipped=0, problem=problem, stopped_after=stopped_after)
    tests, failed, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    failed += errors
    return Check(
        backend=name, passed=tests - failed - skipped, failed=failed, skipped=skipped, stopped_after=stopped_after
    )
