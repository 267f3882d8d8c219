"""Run the cases of some settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from posenc.bench import attention, machine, memory, model, timing
from posenc.bench.cases import KINDS, Case, Settings
from posenc.bench.results import Memory, Result, Row


def build(case: Case) -> timing.Pair:
    """Both sides of a case."""
    return model.build(case) if KINDS[case.kind].of_model else attention.build(case)


def run(settings: Settings, step: Callable[[str], None]) -> Result:
    """Measure every case; times first, memory last, so that no child process disturbs a time.

    Parameters
    ----------
    step : callable
        Told the case after each of ``steps(settings)`` steps.
    """
    settings.check()
    cases = settings.cases()
    facts = {**machine.describe(), "load_before": machine.load()}
    watch = machine.Watch()
    threads = torch.get_num_threads()
    timings = []
    try:
        for case in cases:
            torch.set_num_threads(case.threads)
            with torch.no_grad():
                timings.append(timing.measure(build(case), settings.rounds, settings.seconds))
            step(str(case))
    finally:
        torch.set_num_threads(threads)
    facts.update(other_cores=watch.other_cores(), load_after=machine.load())
    rows = []
    known: dict[Case, int] = {}  # the baseline's peak is the same for every strategy
    for case, measured in zip(cases, timings, strict=True):
        rows.append(_row(case, measured, _peaks(case, known, step) if measures_memory(settings) else None))
    return Result(format="posenc-bench", version=1, command=settings.command(), machine=facts, rows=tuple(rows))


def steps(settings: Settings) -> int:
    """How often ``run`` reports."""
    return len(settings.cases()) * (2 if measures_memory(settings) else 1)


def measures_memory(settings: Settings) -> bool:
    """True when memory is asked for and this system tells it."""
    return settings.memory and memory.available()


def _peaks(case: Case, known: dict[Case, int], step: Callable[[str], None]) -> Memory:
    if case.baseline not in known:
        known[case.baseline] = memory.peak_bytes(case.baseline, "plain")
    peaks = Memory(plain=known[case.baseline], remapped=memory.peak_bytes(case, "remapped"))
    step(f"memory of {case}")
    return peaks


def _row(case: Case, measured: timing.Timing, peaks: Memory | None) -> Row:
    facts: dict[str, Any] = {key: getattr(case, key) for key in Case.__dataclass_fields__}
    return Row(
        **facts,
        params=case.params,
        first=measured.first,
        plain=measured.plain,
        remapped=measured.remapped,
        memory=peaks,
    )
