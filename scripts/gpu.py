"""Check every backend on this GPU with tests and a canary, then time it: 8 minutes, one result file.

    make gpu                                       # into docs/results, and update its page
    python3 -m scripts.gpu --minutes 4             # the same without make
    python3 -m scripts.gpu --only times            # with the checks of an earlier run in the same --folder
    python3 -m scripts.gpu --collect out/gpu/run   # the result file from the lines of a run that was cut short
    python3 -m scripts.gpu --device cpu --smoke    # the same steps on tiny shapes and the CPU, into out/gpu

Results go to --folder as JSON lines at once, so that a kill loses nothing. The exit status is 0 if all checks passed
and times were measured, 1 if a check failed or nothing could be measured, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from scripts import gpu_tests
from scripts.gpu_canary import BACKENDS, CPU_BACKENDS, Canary
from scripts.gpu_canary import FILE as CANARY_LINES
from scripts.gpu_process import Workers, end_by_exception
from scripts.gpu_setup import FOLDER, facts, no_device, unusable
from scripts.gpu_site import ROOT, prepare

if TYPE_CHECKING:
    from posenc.bench.results import Check

ALSO_TESTED = ("reference",)
SMOKE_TEST = "test_an_empty_batch"
"""The test that --smoke runs."""

MINUTES = 8.0
CHECKS_SHARE = 0.35
"""Tests and canary of all backends run side by side and end after this share of the time."""

ALONE_SHARE = 0.9
"""The same with ``--only checks``."""


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, and write the result file and the page of its folder."""
    chosen = parse(arguments)
    end_by_exception()
    prepare()
    from posenc.errors import PosencError

    try:
        if chosen.collect is not None:
            return write(chosen.collect, chosen)
        reason = no_device(chosen.device)
        return fail(reason) if reason is not None else run(chosen)
    except PosencError as error:
        return fail(str(error))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python3 -m scripts.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time limit for everything")
    parser.add_argument("--backend", action="append", metavar="NAME", help="repeatable [default: all of the device]")
    parser.add_argument("--only", choices=("checks", "times"), help="one half of the work")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of lines and logs [default: out/gpu/run]")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="only make a result from the lines there")
    parser.add_argument("--out", type=Path, help="folder of the result file [default: docs/results; smoke: out/gpu]")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cpu" and not chosen.smoke:
        parser.error("--device cpu needs --smoke; to measure the CPU, use posenc bench")
    chosen.out = chosen.out or ROOT / ("out/gpu" if chosen.smoke else "docs/results")
    return chosen


def fail(message: str) -> int:
    """Print a message and return the exit status for a run that is impossible here."""
    print(f"gpu: {message}", file=sys.stderr)
    return 2


def run(chosen: argparse.Namespace) -> int:
    """Run the steps, and write a result of what was measured whatever happens."""
    from posenc.bench import collect, lines, machine
    from posenc.files import make_folder
    from scripts.gpu_timing import Timing

    ends = time.monotonic() + 60 * chosen.minutes
    make_folder(chosen.out)
    make_folder(chosen.folder)
    file = chosen.folder / collect.FILE
    if chosen.only == "times":
        collect.forget_times(chosen.folder)
    else:
        for stale in (file, chosen.folder / CANARY_LINES):
            stale.unlink(missing_ok=True)
    with Workers(chosen.backend or (BACKENDS if chosen.device == "cuda" else CPU_BACKENDS), chosen.folder) as workers:
        if chosen.only != "times":
            check(chosen, file, workers)
            if chosen.only == "checks":
                return 0 if good(collect.checks(chosen.folder)) else 1
        else:  # wait until all have imported, and check that they still can run
            for name, reason in unusable(workers, chosen.device).items():
                if name not in collect.unusable(chosen.folder):
                    lines.append(file, {"unusable": {"backend": name, "reason": reason}})
        for name in collect.unusable(chosen.folder):
            workers.pop(name, None)
        lines.append(file, {"command": command(chosen)})
        try:
            timing = Timing(file, workers, ends)
            for name in workers:
                unfitness = unfit(name, collect.checks(chosen.folder))
                if unfitness is not None:
                    timing.leave_out(name, unfitness)
            timing.measure(chosen.smoke)
            lines.append(file, {"ended": {"load_after": machine.load()}})
        finally:  # also when stopped
            status = write(chosen.folder, chosen)
    return status


def command(chosen: argparse.Namespace) -> str:
    """Return the command line that repeats the run, with only the names of files and folders."""
    tiles = os.environ.get("POSENC_TRITON_TILES")
    words = [f"POSENC_TRITON_TILES={Path(tiles).name}"] if tiles else []
    words += ["python3", "-m", "scripts.gpu"]
    words += ["--device", chosen.device, "--smoke"] if chosen.smoke else []
    words += [word for name in chosen.backend or () for word in ("--backend", name)]
    return shlex.join([*words, *(() if chosen.minutes == MINUTES else ("--minutes", f"{chosen.minutes:g}"))])


def check(chosen: argparse.Namespace, file: Path, workers: Workers) -> None:
    """Write the facts of the machine, then run the tests and the canary of every backend side by side; a line each."""
    from posenc.bench import lines

    ends = time.monotonic() + 60 * chosen.minutes * (ALONE_SHARE if chosen.only else CHECKS_SHARE)
    machine = facts(workers, chosen.device)
    if machine is None:
        raise SystemExit(fail(f"no process could query the device: see the logs in {chosen.folder}"))
    lines.append(file, {"facts": machine})
    reasons = unusable(workers, chosen.device)
    for name, reason in reasons.items():
        lines.append(file, {"unusable": {"backend": name, "reason": reason}})
    usable = {name: worker for name, worker in workers.items() if name not in reasons}
    tested = (*usable, *(() if chosen.backend or chosen.device == "cpu" else ALSO_TESTED))
    canary, left = Canary(chosen.folder, chosen.device, chosen.smoke), ends - time.monotonic()
    aside = threading.Thread(target=canary.run, args=(usable, left), daemon=True)
    aside.start()
    tests = gpu_tests.check(tested, chosen.device, left, chosen.folder, SMOKE_TEST if chosen.smoke else "")
    aside.join()
    for item in (*tests, *canary.checks.values()):
        lines.append(file, {"check": item.model_dump()})
        print(f"{item.backend}, {item.kind}: {item.passed} passed, {item.failed} failed. {item.problem or ''}".strip())


def good(checks: list[Check]) -> bool:
    """Return True if something was checked and nothing was wrong."""
    return bool(checks) and all(item.good for item in checks)


def unfit(name: str, checks: list[Check]) -> str | None:
    """Return why a backend must not be timed, or None."""
    canary = next((item for item in checks if (item.backend, item.kind) == (name, "canary")), None)
    if canary is None:
        return "no canary has compared its outputs"
    if not canary.good:
        return f"its canary failed ({canary.problem or 'no case ran'})"
    return None


def write(folder: Path, chosen: argparse.Namespace) -> int:
    """Write the result file from a folder's lines and the page of all results, then print the short table."""
    from posenc.bench import collect, results, summary
    from posenc.bench.report import describe_machine, write_report
    from posenc.files import make_folder

    checks, left_out = collect.checks(folder), collect.left_out(folder)
    for line in left_out:
        print(f"not measured: {line}")
    for item in checks:
        if not item.good:
            print(f"{item.backend}, {item.kind}: {item.failed} failed, {item.passed} passed. {item.problem or ''}")
    if not collect.rows(folder):
        print("gpu: nothing was measured", file=sys.stderr)
        return 1
    result = collect.collect(folder)
    make_folder(chosen.out)
    print(describe_machine(result.machine))
    print(f"written: {results.save(result, chosen.out)}")
    print(f"written: {write_report(chosen.out)}")
    print(summary.table(result.rows))
    return 0 if good(checks) else 1


if __name__ == "__main__":
    sys.exit(main())
