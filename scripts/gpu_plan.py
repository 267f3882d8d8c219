"""Do the whole first run on a GPU as one command: wheels, versions, checks, tiles, times; results in one folder.

    python3 -m scripts.gpu_plan --out OUT            # at most 460 seconds; docs/gpu.md explains the steps
    python3 -m scripts.gpu_plan --out OUT --smoke    # the same steps on tiny shapes and the CPU

If a step fails or takes too long, that is noted and the next one begins. While a step runs, its files are copied to
--out every few seconds, so that nothing is lost when the plan itself is killed. The output ends with one short table.
The exit status is 0 if every step succeeded, else 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scripts.gpu_process import end_by_exception
from scripts.gpu_setup import FOLDER
from scripts.gpu_site import ROOT, WHEELS, prepare

SECONDS = 460.0
RESERVE = 5.0
"""Seconds reserved for the copies and the table."""

KEPT = ("gpu.jsonl", "canary.jsonl", "sweep.jsonl", "sweep.json", "tiles.json", "setup.json", "log.txt")
"""The files to keep; with the result file, at most eight."""

LARGEST = 16 * 2**20
COPY_EVERY = 2.0
MERCY = 10.0
"""Seconds between asking a step to end and killing it."""

SHOWN = 25
"""Number of last lines of a step's output that are printed; log.txt has all of them."""

LOG_TAIL = 60
"""Number of last lines of every process's log that go to log.txt."""


@dataclass(frozen=True)
class Step:
    """One command and its time limit in seconds."""

    name: str
    words: tuple[str, ...]
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    """Run every step, then print the table."""
    chosen = parse(arguments)
    end_by_exception()
    prepare()
    plan = Plan(chosen.out, chosen.folder, chosen.smoke, chosen.seconds, install=not chosen.no_install)
    try:
        plan.run()
    finally:
        plan.finish()
    return 0 if all(verdict == "ok" for _, verdict, _ in plan.verdicts) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python3 -m scripts.gpu_plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the files worth keeping")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--no-install", action="store_true", help="do not install .wheels: nothing is missing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="limit for all steps together [default: 460]")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder the steps use [default: out/gpu/run]")
    return parser.parse_args(arguments)


class Plan:
    """Steps that work in one folder, and copies of their files in another."""

    def __init__(self, out: Path, folder: Path, smoke: bool, seconds: float, *, install: bool = True) -> None:
        self.out, self.folder, self.smoke = out, folder.resolve(), smoke
        self.install = install and bool(list(WHEELS.glob("*.whl")))
        self.began = time.monotonic()
        self.ends = self.began + seconds - RESERVE
        self.verdicts: list[tuple[str, str, float]] = []
        self.environment = {"TRITON_CACHE_DIR": str(self.folder / "triton")}
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in (*KEPT, "*.log", "step-*.txt", "results/*"):  # left by an earlier run
            for file in folder.glob(pattern):
                file.unlink()
        out.mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        """Run the steps in order."""
        small = ("--device", "cpu", "--smoke") if self.smoke else ()
        folder, results = str(self.folder), str(self.folder / "results")
        if self.install:
            self.step(Step("install", ("scripts.gpu_site",), 60))
            prepare()
        setup = ("scripts.gpu_setup", "--out", str(self.folder / "setup.json"), *small[2:])
        self.step(Step("versions", setup, 75))
        gpu = ("scripts.gpu", *small, "--folder", folder, "--out", results)
        self.step(Step("checks", (*gpu, "--only", "checks", "--minutes", "1.5"), 100))
        self.step(Step("sweep", ("scripts.gpu_sweep", *small, "--out", folder, "--seconds", "80"), 95))
        if (self.folder / "tiles.json").exists():
            self._try_tiles(small)
        left = self.ends - time.monotonic() - 5
        self.step(Step("times", (*gpu, "--only", "times", "--minutes", f"{min(4.0, left / 60):.2f}"), left))

    def _try_tiles(self, small: tuple[str, ...]) -> None:
        """Use the swept tiles if they pass the canary at all its lengths."""
        tiles = self.folder / "tiles.json"
        self.environment["POSENC_TRITON_TILES"] = str(tiles)
        words = ("scripts.gpu_canary", *small, "--backend", "triton", "--seconds", "30", "--folder", str(self.folder))
        if self.smoke:
            self.environment["TRITON_INTERPRET"] = "1"
            words = (*words, "--lengths", "64", "--case", "lampe")
        if not self.step(Step("canary of the tiles", words, 40)):
            del self.environment["POSENC_TRITON_TILES"]
            self._note("the swept tiles are not used\n")
        self.environment.pop("TRITON_INTERPRET", None)

    def step(self, step: Step) -> bool:
        """Run a step within its limit and that of the plan; True if it succeeded."""
        began = time.monotonic()
        limit = min(step.seconds, self.ends - began)
        if limit < 1:
            self.verdicts.append((step.name, "no time was left", 0.0))
            return False
        command = [sys.executable, "-m", *step.words]
        output = self.folder / f"step-{len(self.verdicts)}.txt"
        print(f"== {step.name}: {' '.join(['python3', *command[1:]])}", flush=True)
        with output.open("w") as file:
            environment = {**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"}
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
        verdict = "ok"
        try:
            while process.poll() is None:
                if time.monotonic() - began > limit:
                    verdict = f"stopped after {limit:.0f} s"
                    break
                time.sleep(0.2)
                self.copy(every=COPY_EVERY)
        finally:
            _end(process)
        if verdict == "ok" and process.returncode:
            verdict = f"exit status {process.returncode}"
        text = output.read_text(errors="replace")
        self._note(f"== {step.name} ({verdict})\n{text}\n")
        print("\n".join(text.splitlines()[-SHOWN:]), flush=True)
        self.verdicts.append((step.name, verdict, time.monotonic() - began))
        self.copy()
        return verdict == "ok"

    _copied = 0.0

    def copy(self, every: float = 0.0) -> None:
        """Copy the files worth keeping, at most once in `every` seconds."""
        if time.monotonic() - self._copied < every:
            return
        self._copied = time.monotonic()
        files = [*(self.folder / name for name in KEPT), *(self.folder / "results").glob("[!.]*.json")]
        for file in files:
            with suppress(OSError):  # not there yet, or being replaced
                if file.stat().st_size <= LARGEST:
                    shutil.copyfile(file, self.out / file.name)

    def finish(self) -> None:
        """Collect the ends of all logs, make the last copies, and print a line per step and the table."""
        for log in sorted(self.folder.glob("*.log")):
            tail = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
            self._note("\n".join([f"== {log.name}", *tail, ""]))
        self.copy()
        for name, verdict, seconds in self.verdicts:
            print(f"{name}: {verdict}, {seconds:.0f} s")
        print(f"files: {', '.join(sorted(file.name for file in self.out.iterdir()))}")
        with suppress(ImportError):
            from posenc.bench import collect, summary

            rows = collect.rows(self.folder)
            print(summary.table(rows) if rows else "no times were measured")

    def _note(self, text: str) -> None:
        with (self.folder / "log.txt").open("a") as file:
            file.write(text)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, so that it can save its results, and kill it if it does not."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(MERCY)
            return
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
