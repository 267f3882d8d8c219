"""Run the cases of some settings."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from posenc.bench import cuda, machine, memory, timing
from posenc.bench.baselines import baselines
from posenc.bench.cases import Case, Settings
from posenc.bench.results import Memory, Result, Row
from posenc.bench.sides import build


def run(settings: Settings, step: Callable[[str], None]) -> Result:
    """Measure every case; times first, memory last, so that no child process disturbs a time.

    Parameters
    ----------
    step : callable
        Told the case after each of ``steps(settings)`` steps.
    """
    settings.check()
    cases = settings.cases()
    facts, watch = began(settings.device)
    rows: list[Row] = []
    if settings.device == "cpu":
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
        facts.update(ended(watch))
        known: dict[Case, int] = {}  # the baseline's peak is the same for every strategy
        for case, measured in zip(cases, timings, strict=True):
            rows.append(row(case, measured, _peaks(case, known, step) if measures_memory(settings) else None))
    else:
        for case in cases:
            rows.append(on_gpu(case, settings))
            step(str(case))
        facts.update(ended(watch))
    return Result(format="posenc-bench", version=1, command=settings.command(), machine=facts, rows=tuple(rows))


def began(device: str) -> tuple[dict[str, Any], machine.Watch]:
    """Facts of the machine as a run begins, and a watch over other work on it."""
    facts = {**machine.describe(), "load_before": machine.load()}
    if device == "cuda":
        gpu = cuda.describe()
        facts |= {**gpu, "versions": {**facts["versions"], **gpu["versions"]}}
    return facts, machine.Watch()


def ended(watch: machine.Watch) -> dict[str, Any]:
    """What other work there was."""
    return {"other_cores": watch.other_cores(), "load_after": machine.load()}


def on_gpu(case: Case, settings: Settings) -> Row:
    """Times and memory of one case on the GPU, and the times of attention kernels alone beside it."""
    gc.collect()
    torch.cuda.empty_cache()
    with torch.no_grad():
        pair = build(case)
        alone, refused = baselines(pair)
        measured, clock, unable = cuda.measure(case, pair, alone, settings.rounds, settings.seconds)
        peaks = None
        if settings.memory:
            peaks = Memory(plain=cuda.peak_bytes(pair.plain), remapped=cuda.peak_bytes(pair.remapped))
    return row(case, measured, peaks, clock=clock, refused=refused | unable)


def on_cpu(case: Case, settings: Settings) -> Row:
    """The same on the CPU, in as many threads as torch has and without memory: for trying out what a GPU will do."""
    with torch.no_grad():
        pair = build(case)
        alone, refused = baselines(pair)
        measured = timing.measure(pair, settings.rounds, settings.seconds, alone)
    return row(case, measured, None, refused=refused)


def steps(settings: Settings) -> int:
    """How often ``run`` reports."""
    return len(settings.cases()) * (2 if settings.device == "cpu" and measures_memory(settings) else 1)


def measures_memory(settings: Settings) -> bool:
    """True when memory is asked for and this system tells it."""
    return settings.memory and memory.available()


def _peaks(case: Case, known: dict[Case, int], step: Callable[[str], None]) -> Memory:
    if case.baseline not in known:
        known[case.baseline] = memory.peak_bytes(case.baseline, "plain")
    peaks = Memory(plain=known[case.baseline], remapped=memory.peak_bytes(case, "remapped"))
    step(f"memory of {case}")
    return peaks


def row(case: Case, measured: timing.Timing, peaks: Memory | None, **facts: Any) -> Row:
    """A row of a result file."""
    facts |= {key: getattr(case, key) for key in Case.__dataclass_fields__}
    return Row(
        **facts,
        params=case.params,
        first=measured.first,
        plain=measured.plain,
        remapped=measured.remapped,
        baselines=dict(measured.baselines),
        memory=peaks,
    )
