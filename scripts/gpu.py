"""Every GPU backend on the GPU at hand: correctness tests, then times, in 8 minutes and one result file.

    make gpu                                      # into docs/results, and its page anew
    python -m scripts.gpu --device cpu --smoke    # the same steps on tiny shapes and the CPU, into out/gpu

Exit status 0 when all tests passed, 1 when one failed or nothing could be measured, 2 when there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from posenc.bench.cases import Settings
    from posenc.bench.results import Check

BEGAN = time.monotonic()
ROOT = Path(__file__).parents[1]
TESTS = ("tests/contract/test_backends.py", "tests/devices")
TESTED = ("triton", "xformers", "torch_flash", "reference")
TIMED = ("triton", "xformers", "torch_flash")
MINUTES = 8.0
TESTS_SHARE = 0.45
"""The tests of all backends run side by side and end after this share of the time."""

LAST_CASE = 25.0
"""Seconds that the case under way and the file need at the end."""

PREFILL = (4096, 8192, 16384, 32768, 65536, 131072)
MAIN_STRATEGY = "lampe"


def main(arguments: list[str] | None = None) -> int:
    """Test, measure, and write the result file and the page of its folder."""
    chosen = parse(arguments)
    try:
        import torch

        from posenc.bench import results
        from posenc.bench.report import describe_machine, write_report
        from posenc.bench.run import run_until
        from posenc.errors import PosencError
        from posenc.plugins import backends
    except ImportError as error:
        return fail(f"{error}. Install posenc and what it needs into this Python, or see 'make gpu-wheels'.")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        return fail("no CUDA GPU here, or this build of torch cannot use it. --device cpu --smoke tries the steps.")
    if not backends():
        return fail("posenc's own plugins are not found: install its wheel, see 'make gpu-wheels'.")
    try:
        results.prepare(chosen.out)
        names, unavailable = usable(TESTED if chosen.device == "cuda" else ("cpu_flash", "reference"), chosen.device)
        deadline = BEGAN + 60 * chosen.minutes
        checks = check(names, chosen.device, seconds=60 * chosen.minutes * TESTS_SHARE)
        for item in checks:
            say(f"{item.backend}: {item.passed} passed, {item.failed} failed. {item.problem or ''}")
        timed = tuple(name for name in names if name in TIMED) if chosen.device == "cuda" else names
        rows, left_out, facts = run_until(parts(timed, chosen.smoke), deadline - LAST_CASE, say)
        left_out = [*unavailable, *left_out]
        if not rows:
            print("nothing could be measured:", *left_out, sep="\n  ", file=sys.stderr)
            return 1
        result = results.Result(
            format="posenc-bench",
            version=1,
            command="make gpu" if chosen.device == "cuda" else "python -m scripts.gpu --device cpu --smoke",
            machine=results.Machine(**facts),
            rows=tuple(rows),
            checks=tuple(checks),
            left_out=tuple(left_out),
        )
        print(describe_machine(result.machine))
        for line in left_out:
            print(f"not measured: {line}")
        print(f"written: {results.save(result, chosen.out)}")
        print(f"written: {write_report(chosen.out)}")
    except PosencError as error:
        return fail(str(error))
    return 0 if checks and all(item.good for item in checks) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scripts.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no case starts that would end after them")
    parser.add_argument("--out", type=Path, help="folder of the result file [default: docs/results; smoke: out/gpu]")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cpu" and not chosen.smoke:
        parser.error("--device cpu goes with --smoke: posenc bench measures the CPU")
    chosen.out = chosen.out or ROOT / ("out/gpu" if chosen.smoke else "docs/results")
    return chosen


def fail(message: str) -> int:
    """One message, and the exit status for what cannot be."""
    print(f"gpu: {message}", file=sys.stderr)
    return 2


def say(message: str) -> None:
    """Progress, with the seconds since the start."""
    print(f"[{time.monotonic() - BEGAN:4.0f} s] {message}", file=sys.stderr, flush=True)


def usable(names: tuple[str, ...], device: str) -> tuple[tuple[str, ...], list[str]]:
    """Those of the backends that can run here, and why the others cannot."""
    import torch

    from posenc.plugins import backends

    found, reasons = [], []
    for name in names:
        if name not in backends():
            reasons.append(f"{name}: no backend of that name is registered")
            continue
        sample = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16, device=device)
        reason = backends()[name].backend.refuses(sample, sample, sample, None)
        if reason is None:
            found.append(name)
        else:
            reasons.append(f"{name}: {reason}")
    return tuple(found), reasons


def check(names: tuple[str, ...], device: str, seconds: float) -> list[Check]:
    """The correctness tests of every backend, side by side in processes of their own."""
    folder = ROOT / "out" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    started = {}
    for name in names:
        report, log = folder / f"{name}.xml", folder / f"{name}.log"
        report.unlink(missing_ok=True)
        options = ("-k", f"[{name}", f"--junitxml={report}", "-p", "no:cacheprovider")
        with log.open("w") as file:
            env = {**os.environ, "POSENC_TEST_DEVICE": device}
            started[name] = subprocess.Popen(
                [sys.executable, "-m", "pytest", *TESTS, *options],
                cwd=ROOT,
                env=env,
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
            found.append(verdict(name, folder / f"{name}.xml", problem))
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
        problem = problem or f"pytest left no report: see out/gpu/{name}.log"
        return Check(backend=name, passed=0, failed=0, skipped=0, problem=problem)
    tests, failed, errors, skipped = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    failed += errors
    return Check(backend=name, passed=tests - failed - skipped, failed=failed, skipped=skipped, problem=problem)


def parts(backends: tuple[str, ...], smoke: bool) -> list[Settings]:
    """What is timed, the most wanted first: time may run out."""
    from posenc.bench.cases import STRATEGIES, Settings
    from posenc.bench.goals import GPU_DTYPE, GPU_LENGTHS, GPU_SHAPES

    if smoke:
        tiny = Settings(strategies=(MAIN_STRATEGY,), lengths=(64, 128), heads=("4/2x16",), backends=backends, rounds=3)
        return [tiny, replace(tiny, kinds=("query",))]
    base = Settings(
        strategies=(MAIN_STRATEGY,),
        dtypes=(GPU_DTYPE,),
        backends=backends,
        device="cuda",
        rounds=9,
        seconds=3.0,
    )
    others = tuple(name for name in STRATEGIES if name != MAIN_STRATEGY)
    found = []
    for strategies, prefill, query in (((MAIN_STRATEGY,), PREFILL, PREFILL[1:]), (others, GPU_LENGTHS, GPU_LENGTHS)):
        for shape in GPU_SHAPES:
            own = replace(base, strategies=strategies, heads=(shape,))
            found.append(replace(own, lengths=prefill))
            found.append(replace(own, kinds=("query",), lengths=query, rounds=50))
    return found


if __name__ == "__main__":
    sys.exit(main())
