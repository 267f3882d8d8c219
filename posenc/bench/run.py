"""Run the cases of some settings."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from posenc.bench import attention, cuda, machine, memory, model, padded, timing
from posenc.bench.cases import KINDS, Case, Settings
from posenc.bench.results import Memory, Result, Row


def build(case: Case) -> timing.Pair:
    """Both sides of a case."""
    if case.kind == "padded_attention":
        return padded.build(case)
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


def run_until(
    parts: Sequence[Settings], deadline: float, step: Callable[[str], None]
) -> tuple[list[Row], list[str], dict[str, Any]]:
    """Measure several settings in order, until time is up; a case that fails costs itself alone.

    Parameters
    ----------
    deadline : float
        No case starts after this time of ``time.monotonic()``.

    Returns
    -------
    (list of Row, list of str, dict)
        What was measured, what was not and why, and the facts of the machine.
    """
    rows: list[Row] = []
    left_out: list[str] = []
    facts, watch = began(parts[0].device)
    for settings in parts:
        for case in settings.cases():
            if time.monotonic() >= deadline:
                left_out.append(f"{case}: no time was left")
                continue
            try:
                rows.append(on_gpu(case, settings) if case.device == "cuda" else on_cpu(case, settings))
            except Exception as error:  # one kernel that fails must not cost the times of the others
                left_out.append(f"{case}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            step(str(case))
    facts.update(ended(watch))
    return rows, left_out, facts


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
    """Times and memory of one case on the GPU."""
    gc.collect()
    torch.cuda.empty_cache()
    with torch.no_grad():
        pair = build(case)
        measured, clock = cuda.measure(case, pair, settings.rounds, settings.seconds)
        peaks = None
        if settings.memory:
            peaks = Memory(plain=cuda.peak_bytes(pair.plain), remapped=cuda.peak_bytes(pair.remapped))
    return row(case, measured, peaks, clock=clock)


def on_cpu(case: Case, settings: Settings) -> Row:
    """Times of one case on the CPU, in as many threads as torch has."""
    with torch.no_grad():
        return row(case, timing.measure(build(case), settings.rounds, settings.seconds), None)


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
        memory=peaks,
    )
