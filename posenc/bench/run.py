"""Run the cases of some settings."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from posenc.bench import cuda, machine, memory, timing
from posenc.bench.baselines import baselines
from posenc.bench.cases import BenchCase
from posenc.bench.results import BenchRow, Machine, Memory, Result
from posenc.bench.settings import BenchSettings
from posenc.bench.sides import build

Step = Callable[[str], None]
"""Called with a description of each step that ended."""


def run(settings: BenchSettings, step: Step) -> Result:
    """Measure every case.

    Parameters
    ----------
    settings : BenchSettings
        What to measure.
    step : callable
        Called after each of the ``steps(settings)`` steps with its case.

    Raises
    ------
    InvalidInputError, UnknownNameError, BackendError
        If :meth:`posenc.bench.settings.BenchSettings.check` refuses the settings.
    """
    settings.check()
    facts, watch = machine_facts(settings.device), machine.Watch()
    cases = settings.cases()
    if settings.device == "cpu":
        timings = _cpu_timings(cases, settings, step)
        facts |= _load_facts(watch)
        peaks = _cpu_peaks(cases, settings, step)  # after the times, so that no child process disturbs them
        rows = [row(*measured) for measured in zip(cases, timings, peaks, strict=True)]
    else:
        rows = []
        for case in cases:
            rows.append(on_gpu(case, settings))
            step(str(case))
        facts |= _load_facts(watch)
    return Result(
        format="posenc-bench", version=1, command=settings.command(), machine=Machine(**facts), rows=tuple(rows)
    )


def machine_facts(device: str) -> dict[str, Any]:
    """Describe the machine at the start of a run, for the machine of a result."""
    facts = {**machine.describe(), "load_before": machine.load()}
    if device == "cuda":
        gpu = cuda.describe()
        facts |= {**gpu, "versions": {**facts["versions"], **gpu["versions"]}}
    return facts


def _load_facts(watch: machine.Watch) -> dict[str, Any]:
    """Describe the other work at the end of a run."""
    return {"other_cores": watch.other_cores(), "load_after": machine.load()}


def _cpu_timings(cases: list[BenchCase], settings: BenchSettings, step: Step) -> list[timing.Timing]:
    """Time every case on the CPU, each with its number of threads."""
    timings = []
    threads = torch.get_num_threads()
    try:
        for case in cases:
            torch.set_num_threads(case.threads)
            with torch.no_grad():
                timings.append(timing.measure(build(case), settings.rounds, settings.seconds))
            step(str(case))
    finally:
        torch.set_num_threads(threads)
    return timings


def _cpu_peaks(cases: list[BenchCase], settings: BenchSettings, step: Step) -> list[Memory | None]:
    """Measure the peak memory of every case on the CPU; that of a baseline once for all strategies."""
    if not measures_memory(settings):
        return [None] * len(cases)
    peaks: list[Memory | None] = []
    plain: dict[BenchCase, int] = {}
    for case in cases:
        if case.baseline not in plain:
            plain[case.baseline] = memory.peak_bytes(case.baseline, "plain")
        peaks.append(Memory(plain=plain[case.baseline], remapped=memory.peak_bytes(case, "remapped")))
        step(f"memory of {case}")
    return peaks


def on_gpu(case: BenchCase, settings: BenchSettings) -> BenchRow:
    """Measure time and memory of one case on the GPU, and the times of attention kernels alone in the same rounds."""
    gc.collect()
    torch.cuda.empty_cache()
    with torch.no_grad():
        pair = build(case)
        kernels, refused = baselines(pair)
        times, clock, not_timed = cuda.measure(case, pair, kernels, settings.rounds, settings.seconds)
        peaks = None
        if settings.memory:
            peaks = Memory(plain=cuda.peak_bytes(pair.plain), remapped=cuda.peak_bytes(pair.remapped))
    return row(case, times, peaks, clock=clock, refused=refused | not_timed)


def on_cpu(case: BenchCase, settings: BenchSettings) -> BenchRow:
    """Measure the same on the CPU, with torch's number of threads and without memory, to try out a run on a GPU."""
    with torch.no_grad():
        pair = build(case)
        kernels, refused = baselines(pair)
        times = timing.measure(pair, settings.rounds, settings.seconds, kernels)
    return row(case, times, None, refused=refused)


def steps(settings: BenchSettings) -> int:
    """Count the steps that ``run`` reports."""
    return len(settings.cases()) * (2 if settings.device == "cpu" and measures_memory(settings) else 1)


def measures_memory(settings: BenchSettings) -> bool:
    """True if the settings ask for memory and this system can measure it."""
    return settings.memory and memory.available()


def row(case: BenchCase, times: timing.Timing, peaks: Memory | None, **facts: Any) -> BenchRow:
    """Make a row of a result file."""
    facts |= {key: getattr(case, key) for key in BenchCase.__dataclass_fields__}
    return BenchRow(
        **facts,
        params=case.params,
        first=times.first,
        plain=times.plain,
        remapped=times.remapped,
        baselines=dict(times.baselines),
        memory=peaks,
    )
