"""Peak extra memory of one side of a case, by a fresh process.

The child builds the case, so that inputs, weights and caches are there, and runs a short case of the same kind,
so that thread pools and libraries are. Then it fills its memory up to its high-water mark with ballast: from
there, every byte that the call needs at once moves the mark, and the difference is the call's peak. Freed tensors go
back to the system at once (``MALLOC_MMAP_THRESHOLD_``): the mark shows what is alive, not what the allocator kept.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from posenc.errors import PosencError

if TYPE_CHECKING:
    from torch import Tensor

    from posenc.bench.cases import Case
    from posenc.bench.timing import Pair

WARM_LENGTH = 256
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def available() -> bool:
    """True where the system tells both the current and the highest memory of a process."""
    return os.path.exists("/proc/self/statm")


def peak_bytes(case: Case, side: str) -> int:
    """Bytes that one call of a side needs on top of its inputs.

    Parameters
    ----------
    side : {"plain", "remapped"}
        Which side to call.

    Raises
    ------
    PosencError
        If the child process fails; its last line says why.
    """
    ran = subprocess.run(
        [sys.executable, "-m", "posenc.bench.memory"],
        input=json.dumps({"case": asdict(case), "side": side}),
        capture_output=True,
        text=True,
        env={**os.environ, **RETURN_FREED},
    )
    if ran.returncode:
        reason = (ran.stderr.strip().splitlines() or [f"exit status {ran.returncode}"])[-1]
        raise PosencError(f"measuring the memory of {case} failed: {reason}. --no-memory leaves it out.")
    return int(json.loads(ran.stdout.splitlines()[-1]))


def call_peak(case: Case, side: str) -> int:
    """The same, in this process, which must be a fresh one."""
    import torch

    from posenc.bench.sides import build

    torch.set_num_threads(case.threads)
    with torch.no_grad():
        short = min(case.length, WARM_LENGTH)
        share = max(1, case.length // case.window)
        _side(build(replace(case, length=short, window=max(1, short // share))), side)()
        return peak_of(_side(build(case), side))


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that a call needs at once on top of what this process holds now."""
    import torch

    gc.collect()
    ballast = torch.ones(max(0, high_water() - resident()), dtype=torch.uint8)
    before = high_water()
    call()
    after = high_water()
    del ballast
    return after - before


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def high_water() -> int:
    """Most bytes this process ever had in memory."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _side(pair: Pair, side: str) -> Callable[[], Tensor]:
    return pair.plain if side == "plain" else pair.remapped


def _main() -> None:
    from posenc.bench.cases import Case

    asked = json.load(sys.stdin)
    print(call_peak(Case(**asked["case"]), asked["side"]))


if __name__ == "__main__":
    _main()
