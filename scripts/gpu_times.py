"""The requests that a worker process of one backend answers: whether it can run here, and the times of one case."""

from __future__ import annotations

from typing import Any

import torch

from posenc.bench import machine, run
from posenc.bench.cases import BenchCase
from posenc.bench.settings import BenchSettings
from posenc.plugins import backends


def describe(device: str) -> dict[str, Any]:
    """Return the facts of the machine for a result."""
    return run.machine_facts(device)


def refusal(backend: str, device: str) -> str | None:
    """Return why a backend cannot run heads of 128 channels in bfloat16 here, or None if it can."""
    if backend not in backends():
        return "no backend of that name is registered"
    sample = torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16, device=device)
    reason: str | None = backends()[backend].backend.refuses(sample, sample, sample, None)
    return reason


def time_case(case: dict[str, Any], rounds: int, seconds: float) -> dict[str, Any]:
    """Return a row of a result file, and how many cores other work used meanwhile."""
    bench_case, settings = BenchCase(**case), BenchSettings(rounds=rounds, seconds=seconds)
    watch = machine.Watch()
    measure = run.on_gpu if bench_case.device == "cuda" else run.on_cpu
    row = measure(bench_case, settings)
    if bench_case.device == "cuda":
        torch.cuda.empty_cache()  # the next case may run in another process
    return {"row": row.model_dump(mode="json"), "other_cores": watch.other_cores()}
