"""Find the best tiles of the Triton kernels for this GPU: compile them side by side, compare with float64, time them.

    python3 -m scripts.gpu_sweep --out out/gpu/run                     # 80 seconds
    POSENC_TRITON_TILES=out/gpu/run/tiles.json python3 -m scripts.gpu  # use the tiles it found
    python3 -m scripts.gpu_sweep --device cpu --smoke                  # the same steps interpreted, on tiny shapes

--out receives sweep.jsonl (a line per candidate and round, written at once), sweep.json (the result) and tiles.json
(the entries that beat the shipped table, followed by that table). The exit status is 0 if every kernel was measured, 1
otherwise, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.gpu_process import Died, Worker, Workers, end_by_exception
from scripts.gpu_setup import FOLDER, no_device
from scripts.gpu_site import prepare

if TYPE_CHECKING:
    from posenc.bench.sweep import Setting
    from posenc.kernels.triton.tiles import Tiling

SECONDS = 80.0
COMPILE_SHARE = 0.65
"""Share of the time after which compiling and checking end."""

CANDIDATE_SECONDS = 40.0
"""A candidate that takes longer to compile and run is taken to hang; the first one also waits for imports."""

PROCESSES = 8
LENGTH, DTYPE = 32768, "bfloat16"
SHAPES = {"32/8x128": {"prefill": 24, "decode": 11}, "32/8x64": {"prefill": 7, "decode": 3}}
"""By heads: the number of candidates of each kernel besides the shipped tiling."""

ROUNDS = {"prefill": 7, "decode": 30}
LINES, RESULT, TILES = "sweep.jsonl", "sweep.json", "tiles.json"


def main(arguments: list[str] | None = None) -> int:
    """Compile, check and time the tiles, and write the table."""
    chosen = parse(arguments)
    end_by_exception()
    prepare()
    reason = no_device(chosen.device)
    if reason is not None:
        print(f"gpu_sweep: {reason}", file=sys.stderr)
        return 2
    sweep = Sweep(chosen.out, chosen.device, chosen.smoke, time.monotonic() + chosen.seconds)
    try:
        sweep.run(chosen.seconds)
    except Died as error:
        print(f"gpu_sweep: {error}", file=sys.stderr)
    finally:
        measured = sweep.write()
    return 0 if measured else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python3 -m scripts.gpu_sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the files [default: out/gpu/run]")
    return parser.parse_args(arguments)


class Sweep:
    """Candidates of every kernel and shape, the results so far, and the files that hold them."""

    def __init__(self, out: Path, device: str, smoke: bool, ends: float) -> None:
        self.out, self.device, self.ends = out, device, ends
        self.shapes = {"4/2x16": {"prefill": 1, "decode": 1}} if smoke else SHAPES
        self.length, self.dtype = (64, "float32") if smoke else (LENGTH, DTYPE)
        self.processes = 2 if smoke else PROCESSES
        self.rounds = {"prefill": 3, "decode": 3} if smoke else ROUNDS
        self.facts: dict[str, Any] | None = None
        self.good: dict[Setting, list[Tiling]] = {}
        self.problems: dict[tuple[Setting, Tiling], str] = {}
        self.times: dict[Setting, list[list[float]]] = {}
        out.mkdir(parents=True, exist_ok=True)
        (out / LINES).unlink(missing_ok=True)

    def run(self, seconds: float) -> None:
        """Compile and check in many processes, then time in one."""
        environment = {"TRITON_INTERPRET": "1"} if self.device == "cpu" else {}
        names = [f"sweep-{number}" for number in range(self.processes)]
        with Workers(names, self.out, environment) as workers:
            self.facts = workers[names[0]].ask("posenc.bench.sweep:describe", seconds, device=self.device)
            self._line({"facts": self.facts})
            waiting = list(self._candidates())
            self.good = {setting: [] for setting, _ in waiting}
            self._say(f"{len(waiting)} candidates in {self.processes} processes")
            ends = self.ends - (1 - COMPILE_SHARE) * seconds
            turns = iter(waiting)
            threads = [
                threading.Thread(target=self._verify, args=(worker, turns, ends), daemon=True)
                for worker in workers.values()
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for setting, tilings in self.good.items():
                tilings[:] = [tiling for other, tiling in waiting if other == setting and tiling in tilings]
            for name in names[1:]:
                workers.pop(name).end()
            self._time(workers[names[0]])

    def _candidates(self) -> Iterator[tuple[Setting, Tiling]]:
        """Yield all candidates, the most likely one of every kernel first."""
        from posenc.bench.sweep import KERNELS, Setting, candidates

        assert self.facts is not None
        capability = tuple(self.facts["capability"])
        for shape, most in self.shapes.items():
            lists = []
            for kernel in KERNELS:
                setting = Setting(kernel, shape, self.length, self.dtype, self.device)
                lists.append([(setting, tiling) for tiling in candidates(setting, capability, most[_kind(kernel)])])
            for turn in range(max(map(len, lists))):
                yield from (pairs[turn] for pairs in lists if turn < len(pairs))

    def _verify(self, worker: Worker, turns: Iterator[tuple[Setting, Tiling]], ends: float) -> None:
        """Check the next candidate again and again in one process, until time is up."""
        for setting, tiling in _shared(turns):
            left = ends - time.monotonic()
            if left <= 0:
                return
            about = {"setting": asdict(setting), "tiling": asdict(tiling)}
            try:
                outcome = worker.ask("posenc.bench.sweep:verify", min(left, CANDIDATE_SECONDS), **about)
            except Died as error:
                outcome = {"good": False, "problem": str(error)}
            self._line({"checked": {**about, **outcome}})
            if outcome["good"]:
                self.good[setting].append(tiling)
            else:
                self.problems[setting, tiling] = (
                    outcome.get("problem") or f"its output is off by {outcome['output']:.2g}"
                )

    def _time(self, worker: Worker) -> None:
        """Time the correct candidates in rounds, the first shape first; skip kernels whose shipped tiling is wrong."""
        for setting, tilings in self.good.items():
            if self._shipped(setting) not in tilings:
                problem = self.problems.get((setting, self._shipped(setting)), "time was up")
                self._say(f"{setting.kernel} {setting.shape}: not timed, because of the shipped tiling: {problem}")
                continue
            about = {"setting": asdict(setting), "tilings": [asdict(tiling) for tiling in tilings]}
            for _ in range(self.rounds[_kind(setting.kernel)]):
                if time.monotonic() > self.ends - 2:
                    break
                try:
                    times = worker.ask("posenc.bench.sweep:one_round", self.ends - time.monotonic(), **about)
                except Died as error:
                    self._say(f"{setting.kernel} {setting.shape}: {error}")
                    break
                self.times.setdefault(setting, []).append(times)
                self._line({"round": {**about, "seconds": times}})

    def _shipped(self, setting: Setting) -> Tiling:
        from posenc.bench.sweep import shipped

        assert self.facts is not None
        return shipped(setting, tuple(self.facts["capability"]))

    def write(self) -> bool:
        """Write the result and the table of whatever was measured; True if that is every kernel."""
        from posenc.bench.sweep import best
        from posenc.files import replacing
        from posenc.kernels.triton.tiles import TileTable

        entries, kernels = [], []
        for setting, rounds in self.times.items():
            tilings = self.good[setting]
            chosen, medians = best(rounds, tilings)
            ratio = medians[tilings.index(chosen)] / medians[0]
            if chosen != tilings[0]:
                assert self.facts is not None
                source = f"{RESULT}: {ratio:.2f} of the shipped tiling's time on {self.facts.get('gpu', 'the CPU')}"
                entries.append(setting.entry(chosen, tuple(self.facts["capability"]), source))
            all_medians = [{**asdict(t), "median": m} for t, m in zip(tilings, medians, strict=True)]
            kernels.append({**asdict(setting), "best": asdict(chosen), "over_shipped": ratio, "tilings": all_medians})
            print(f"{setting.kernel} {setting.shape}: {chosen}: {ratio:.2f} of the shipped tiling's time")
        result = {"format": "posenc-sweep", "version": 1, "machine": self.facts, "kernels": kernels}
        with replacing(self.out / RESULT) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (self.out / TILES).unlink(missing_ok=True)
        if entries:
            TileTable.shipped().with_first(entries).write(self.out / TILES)
        print(f"written: {self.out / RESULT}" + (f", {self.out / TILES}" if entries else "; none beat the shipped"))
        return bool(self.good) and set(self.times) == set(self.good)

    def _line(self, entry: dict[str, Any]) -> None:
        from posenc.bench import lines

        lines.append(self.out / LINES, entry)

    def _say(self, message: str) -> None:
        print(f"sweep: {message}", file=sys.stderr, flush=True)


LOCK = threading.Lock()


def _shared(turns: Iterator[tuple[Setting, Tiling]]) -> Iterator[tuple[Setting, Tiling]]:
    """Yield the remaining items of an iterator that several threads read."""
    while True:
        with LOCK:
            pair = next(turns, None)
        if pair is None:
            return
        yield pair


def _kind(kernel: str) -> str:
    return "prefill" if kernel == "prefill" else "decode"


if __name__ == "__main__":
    sys.exit(main())
