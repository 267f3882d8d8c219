"""The machine that a result was measured on: enough to compare results, nothing that identifies the machine."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from posenc.trace import versions


def describe() -> dict[str, Any]:
    """Describe the CPU, cores, memory, versions, and settings that affect times."""
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gib": memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "versions": versions(),
    }


def cpu_model() -> str:
    """The name of the CPU, if the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine() or "unknown CPU")


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """The memory of the machine in GiB; None if the system does not give it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def load() -> float | None:
    """The load average of the last minute; None if the system does not give it."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@dataclass(frozen=True)
class Watch:
    """Measure how many cores other work used since the watch was made.

    A load average does not tell: it counts the run itself, and the run before it.
    """

    _busy_at_start: float | None = field(default_factory=lambda: busy_seconds())
    _process_at_start: float = field(default_factory=time.process_time)
    _started: float = field(default_factory=time.perf_counter)

    def other_cores(self) -> float | None:
        """Cores that other processes, or other guests of the host, used on average; None if unknown."""
        busy, seconds = busy_seconds(), time.perf_counter() - self._started
        if busy is None or self._busy_at_start is None or seconds <= 0:
            return None
        by_this_process = time.process_time() - self._process_at_start
        return round(max(0.0, busy - self._busy_at_start - by_this_process) / seconds, 2)


def busy_seconds() -> float | None:
    """Seconds that all cores together were busy since boot; None if the system does not count exactly our cores."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, lines[0].split()[1:])
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    if sum(line.startswith("cpu") for line in lines) - 1 != cores():
        return None
    return (user + nice + system + irq + softirq + steal) / ticks
