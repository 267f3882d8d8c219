"""Peak memory of one side of a case beyond its inputs, measured in a fresh process.

The child runs a short case of the same kind, which loads libraries and starts thread pools, and builds the case itself
with its inputs, weights and caches. Then it fills its memory with ballast up to its high-water mark. From there on,
every byte that the call needs at once raises the mark, and the difference is the peak of the call. Freed tensors
return to the system at once (``MALLOC_MMAP_THRESHOLD_``), so the mark shows live memory, not what the allocator keeps.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from posenc.bench.cases import BenchCase
from posenc.bench.sides import build
from posenc.bench.timing import Pair
from posenc.errors import PosencError

WARM_LENGTH = 256
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def available() -> bool:
    """True if the system gives both the current and the highest memory of a process."""
    return os.path.exists("/proc/self/statm")


def peak_bytes(case: BenchCase, side: str) -> int:
    """Measure the bytes that one call of a side needs beyond its inputs, in a fresh process.

    Parameters
    ----------
    side : {"plain", "remapped"}
        Which side to call.

    Raises
    ------
    PosencError
        If the child process fails; the message ends with its last line.
    """
    process = subprocess.run(
        [sys.executable, "-m", "posenc.bench.memory"],
        input=json.dumps({"case": asdict(case), "side": side}),
        capture_output=True,
        text=True,
        env={**os.environ, **RETURN_FREED},
    )
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        raise PosencError(f"measuring the memory of {case} failed: {reason}. Skip it with --no-memory.")
    return int(json.loads(process.stdout.splitlines()[-1]))


def call_peak(case: BenchCase, side: str) -> int:
    """Measure the same in this process, which must be a fresh one."""
    torch.set_num_threads(case.threads)
    with torch.no_grad():
        short = min(case.length, WARM_LENGTH)
        share = max(1, case.length // case.window)
        _side(build(replace(case, length=short, window=max(1, short // share))), side)()
        return peak_of(_side(build(case), side))


def peak_of(call: Callable[[], object]) -> int:
    """Measure the bytes that a call needs at once beyond what this process holds now."""
    gc.collect()
    ballast = torch.ones(max(0, high_water() - resident()), dtype=torch.uint8)
    before = high_water()
    call()
    after = high_water()
    del ballast
    return after - before


def resident() -> int:
    """Bytes of memory that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def high_water() -> int:
    """Most bytes of memory that this process ever held."""
    import resource  # Windows lacks it

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _side(pair: Pair, side: str) -> Callable[[], Tensor]:
    return pair.plain if side == "plain" else pair.remapped


def _main() -> None:
    request = json.load(sys.stdin)
    print(call_peak(BenchCase(**request["case"]), request["side"]))


if __name__ == "__main__":
    _main()
