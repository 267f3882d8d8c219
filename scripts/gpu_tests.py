"""Run the correctness tests of every backend on this device, side by side in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from scripts.gpu_site import ROOT

if TYPE_CHECKING:
    from posenc.bench.results import Check

TESTS = ("tests/contract/test_backends.py", "tests/devices")
OUTCOME = re.compile(r"^(?:.*::\S+|\[gw\d+\] \[ *\d+%\]) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
"""How ``pytest -v`` prints the outcome of a test, alone and under pytest-xdist."""

PROCESSES = 4
"""Processes of pytest per backend, if pytest-xdist is installed."""


def check(names: tuple[str, ...], device: str, seconds: float, folder: Path, only: str = "") -> list[Check]:
    """Run the tests of every backend and return the outcomes; those still running after ``seconds`` are stopped.

    Parameters
    ----------
    only : str
        Run only tests whose names contain it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started = {}
    for name in names:
        report, log = folder / f"tests-{name}.xml", folder / f"tests-{name}.log"
        report.unlink(missing_ok=True)
        words = f"[{name} and {only}" if only else f"[{name}"
        options = ["-vv", "-k", words, f"--junitxml={report}", "-p", "no:cacheprovider"]
        if find_spec("xdist") and device == "cuda":
            options += ["-n", str(PROCESSES)]
        with log.open("w") as file:
            started[name] = subprocess.Popen(
                [sys.executable, "-m", "pytest", *TESTS, *options],
                cwd=ROOT,
                env={**os.environ, "POSENC_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that pytest's own processes are killed with it
            )
    ends = time.monotonic() + seconds
    checks = []
    try:
        for name, process in started.items():
            stopped = None
            try:
                process.wait(max(0.0, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                stopped = seconds
                _end(process)
            checks.append(verdict(name, folder, stopped))
    finally:
        for process in started.values():
            _end(process)  # if interrupted: no test outlives this function
    return checks


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def verdict(name: str, folder: Path, stopped_after: float | None) -> Check:
    """Return pytest's outcome for a backend, from its report, or from the lines of its log if it was stopped early."""
    from posenc.bench.results import Check

    report, log = folder / f"tests-{name}.xml", folder / f"tests-{name}.log"
    problem = None
    try:
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
        counts = [int(suite.get(key, 0)) for key in ("failures", "errors", "skipped", "tests")]
        failed, skipped = counts[0] + counts[1], counts[2]
        passed = counts[3] - failed - skipped
    except (OSError, ElementTree.ParseError, StopIteration):
        words = Counter(OUTCOME.findall(log.read_text(errors="replace") if log.exists() else ""))
        passed, failed, skipped = words["PASSED"], words["FAILED"] + words["ERROR"], words["SKIPPED"]
        if stopped_after is None:
            problem = f"pytest left no report: see {log.name}"
    facts = {"passed": passed, "failed": failed, "skipped": skipped, "problem": problem}
    return Check(backend=name, **facts, stopped_after=stopped_after)
