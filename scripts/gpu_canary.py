"""Compare the outputs of every GPU backend with float64 at the sizes that are timed, one process per backend.

    python3 -m scripts.gpu_canary                          # every backend of the GPU, 60 seconds, into out/gpu/run
    python3 -m scripts.gpu_canary --backend triton --lengths 4096
    python3 -m scripts.gpu_canary --device cpu --smoke     # the same steps on tiny shapes and the CPU

Each case is written to canary.jsonl as a JSON line as soon as it is done. The exit status is 0 if every backend that
can run is right, 1 if one is wrong or nothing could be checked, and 2 without a GPU. posenc/bench/canary.py explains
what is compared.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.gpu_process import Died, Worker, Workers, end_by_exception
from scripts.gpu_setup import FOLDER, no_device, unusable
from scripts.gpu_site import prepare

if TYPE_CHECKING:
    from posenc.bench.cases import BenchCase
    from posenc.bench.results import Check

BACKENDS = ("triton", "torch_flash", "xformers", "flash_attn_4")
CPU_BACKENDS = ("cpu_flash", "reference")
FILE = "canary.jsonl"
SECONDS = 60.0
LENGTHS, HEADS, DTYPES = (4096, 131072), "32/8x128", ("bfloat16", "float16")
SMOKE_LENGTHS, SMOKE_HEADS, SMOKE_DTYPES = (64, 256), "4/2x16", ("float32",)
CHECK = "posenc.bench.canary:report"
CASE_SECONDS = 45.0
"""A case that takes longer is taken to hang; the first one also waits for imports."""

MOST_RESTARTS = 3
SHOWN = 3
"""Number of wrong cases printed per backend; the file has all of them."""


def main(arguments: list[str] | None = None) -> int:
    """Check all backends, side by side."""
    chosen = parse(arguments)
    end_by_exception()
    prepare()
    reason = no_device(chosen.device)
    if reason is not None:
        print(f"gpu_canary: {reason}", file=sys.stderr)
        return 2
    names = chosen.backend or (BACKENDS if chosen.device == "cuda" else CPU_BACKENDS)
    ends = time.monotonic() + chosen.seconds
    with Workers(names, chosen.folder) as workers:
        for name, reason in unusable(workers, chosen.device).items():
            print(f"not checked: {name}: {reason}")
            workers.pop(name).end()
        lengths = tuple(chosen.lengths) if chosen.lengths else None
        checks = Canary(chosen.folder, chosen.device, chosen.smoke, lengths, chosen.case).run(
            workers, ends - time.monotonic()
        )
    for check in checks:
        wrong = "" if check.problem is None else f": {check.problem}"
        print(f"canary of {check.backend}: {check.passed} right, {check.failed} wrong, {check.skipped} not run{wrong}")
    return 0 if checks and all(check.good for check in checks) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python3 -m scripts.gpu_canary", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", action="append", metavar="NAME", help="repeatable [default: all of the device]")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens [default: 4096 131072]")
    parser.add_argument(
        "--case", default="", metavar="TEXT", help="only cases whose line contains it: 'query (raw keys)'"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="cases not run by then are not checked")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of lines and logs [default: out/gpu/run]")
    return parser.parse_args(arguments)


class Canary:
    """Cases of chosen sizes, checked for several backends at once; a line per case in a file of the folder."""

    def __init__(
        self, folder: Path, device: str, smoke: bool, lengths: tuple[int, ...] | None = None, only: str = ""
    ) -> None:
        self.folder, self.device, self.only = folder, device, only
        self.dtypes: tuple[str, ...]
        small = (SMOKE_LENGTHS, SMOKE_HEADS, SMOKE_DTYPES)
        usual, self.heads, self.dtypes = small if smoke else (LENGTHS, HEADS, DTYPES)
        self.lengths = lengths or usual
        self.checks: dict[str, Check] = {}
        self.wrong: Counter[str] = Counter()

    def run(self, workers: dict[str, Worker], seconds: float) -> list[Check]:
        """Check every backend in its process and return the outcomes."""
        ends = time.monotonic() + seconds
        self.seconds = seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        threads = [
            threading.Thread(target=self._cases, args=(name, worker, ends), daemon=True)
            for name, worker in workers.items()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [self.checks[name] for name in workers]

    def _cases(self, name: str, worker: Worker, ends: float) -> None:
        """Run all cases of one backend."""
        from posenc.bench import canary
        from posenc.bench.results import Check

        passed = failed = deaths = 0
        problem = None
        every = canary.cases(name, self.device, self.lengths, self.heads, self.dtypes)
        cases: list[BenchCase] = [case for case in every if self.only in str(case)]
        for case in cases:
            left = ends - time.monotonic()
            if left <= 0 or deaths > MOST_RESTARTS:
                break
            try:
                verdict = worker.ask(CHECK, min(left, CASE_SECONDS), case=asdict(case))
            except Died as error:
                if time.monotonic() >= ends:
                    break  # stopped in the middle: neither right nor wrong
                deaths += 1
                failed += 1
                problem = problem or f"{case}: {error}"
                self._say(name, {"case": str(case), "good": False, "text": str(error)})
                continue
            self._say(name, verdict)
            passed += verdict["good"]
            failed += not verdict["good"]
            if not verdict["good"]:
                problem = problem or f"{verdict['case']}: {verdict['text']}"
        skipped = len(cases) - passed - failed
        facts = {"passed": passed, "failed": failed, "skipped": skipped, "problem": problem}
        stopped = self.seconds if skipped and time.monotonic() >= ends else None
        self.checks[name] = Check(backend=name, kind="canary", **facts, stopped_after=stopped)

    def _say(self, name: str, entry: dict[str, Any]) -> None:
        from posenc.bench import lines

        lines.append(self.folder / FILE, {"canary": name, **entry})
        self.wrong[name] += not entry["good"]
        if not entry["good"] and self.wrong[name] <= SHOWN:
            print(f"canary of {name}: WRONG: {entry['case']}: {entry['text']}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
