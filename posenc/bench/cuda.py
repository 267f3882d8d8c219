"""Times and memory on a GPU.

``attention`` is timed by CUDA events around each call. ``query`` is a few microseconds of work behind many of Python,
so all sides are recorded as CUDA graphs and replayed: that is the kernels' time, without Python's. Where one of the
two cannot be recorded, all are timed by events, and the row says so.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import torch

from posenc.bench.cases import BenchCase
from posenc.bench.timing import Pair, Sides, Timing, alternate

WARM_CALLS = 3
GRAPH_CALLS = 10
"""Calls in one graph: launching a graph takes as long as a short call, and is shared by them."""


def measure(
    case: BenchCase, pair: Pair, baselines: Sides, rounds: int, seconds: float
) -> tuple[Timing, Literal["events", "graph"], dict[str, str]]:
    """Times of all sides in turns, the clock that they were read from, and baselines that it cannot time.

    Baselines have been called before, as :func:`posenc.bench.baselines.baselines` does.
    """
    first = (events(pair.plain), events(pair.remapped))
    recorded = _recorded({"plain": pair.plain, "remapped": pair.remapped}) if case.kind == "query" else None
    if recorded is None:
        return alternate(first, pair, baselines, rounds, seconds, events), "events", {}
    alone = {name: _recorded({name: call}) for name, call in baselines.items()}
    able = {name: found[name] for name, found in alone.items() if found is not None}
    refused = dict.fromkeys(baselines.keys() - able.keys(), "it cannot be recorded as a CUDA graph")
    return alternate(first, Pair(**recorded), able, rounds, seconds, replayed), "graph", refused


def events(call: Callable[[], object]) -> float:
    """Seconds between two events around one call, the GPU idle before."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def replayed(call: Callable[[], object]) -> float:
    """Seconds of one of the calls that a graph holds."""
    return events(call) / GRAPH_CALLS


def _recorded(sides: Sides) -> dict[str, Callable[[], torch.Tensor]] | None:
    """All of the sides as graphs, or None where one cannot be recorded."""
    try:
        return {name: record(call) for name, call in sides.items()}
    except RuntimeError:  # a copy from the host, or an allocation that a graph cannot hold
        torch.cuda.synchronize()
        return None


def record(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A graph of ``GRAPH_CALLS`` calls; replaying it fills the same output again."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            out = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that one call holds at once on top of what is allocated now."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def describe() -> dict[str, Any]:
    """The GPU, its driver, and the versions of what only a GPU uses, for the machine of a result."""
    found = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    for name in ("triton", "xformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {"gpu": torch.cuda.get_device_name(), "driver": driver(), "versions": found}


def driver() -> str | None:
    """The driver's version, where nvidia-smi tells it."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ran = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(ran.stdout.split()), None)
