"""Time and memory on a GPU.

``attention`` is timed by CUDA events around each call. A call of ``query`` is a few microseconds of kernels after many
more of Python, so all sides are captured as CUDA graphs and replayed: this measures the kernels without Python. If the
plain or the remapped side cannot be captured, all sides are timed by events, and the row says so.
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
"""Calls in one graph: they share the time of launching it, which is as long as that of a short call."""


def measure(
    case: BenchCase, pair: Pair, baselines: Sides, rounds: int, seconds: float
) -> tuple[Timing, Literal["events", "graph"], dict[str, str]]:
    """Time all sides in turns.

    Parameters
    ----------
    baselines : mapping of str to callable
        Each has been called before, as :func:`posenc.bench.baselines.baselines` does.
    rounds, seconds
        As in :func:`posenc.bench.timing.measure`.

    Returns
    -------
    (Timing, {"events", "graph"}, dict of str to str)
        The times, the clock that they were read from, and the baselines that this clock cannot time, with the reason.
    """
    first = (events(pair.plain), events(pair.remapped))
    graphs = _captured({"plain": pair.plain, "remapped": pair.remapped}) if case.kind == "query" else None
    if graphs is None:
        return alternate(first, pair, baselines, rounds, seconds, events), "events", {}
    baseline_graphs: dict[str, Callable[[], torch.Tensor]] = {}
    for name, call in baselines.items():
        baseline_graphs |= _captured({name: call}) or {}
    refused = dict.fromkeys(baselines.keys() - baseline_graphs.keys(), "it cannot be captured as a CUDA graph")
    return alternate(first, Pair(**graphs), baseline_graphs, rounds, seconds, replayed), "graph", refused


def events(call: Callable[[], object]) -> float:
    """Measure the seconds between two events around one call; the GPU is idle before it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def replayed(call: Callable[[], object]) -> float:
    """Measure a replay of a graph, and return the seconds of one of its calls."""
    return events(call) / GRAPH_CALLS


def _captured(sides: Sides) -> dict[str, Callable[[], torch.Tensor]] | None:
    """Capture all of the sides as graphs; None if one cannot be captured."""
    try:
        return {name: capture(call) for name, call in sides.items()}
    except RuntimeError:  # a copy from the host, or an allocation that a graph cannot hold
        torch.cuda.synchronize()
        return None


def capture(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Capture ``GRAPH_CALLS`` calls as a graph; replaying it writes the same output tensor again."""
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
    """Measure the most bytes that one call holds at once, beyond what is allocated now."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before


def describe() -> dict[str, Any]:
    """Name the GPU, its driver, and the versions of libraries that only a GPU uses, for the machine of a result."""
    versions = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    for name in ("triton", "xformers"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"gpu": torch.cuda.get_device_name(), "driver": driver(), "versions": versions}


def driver() -> str | None:
    """Ask nvidia-smi for the driver's version; None if it does not answer."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(process.stdout.split()), None)
