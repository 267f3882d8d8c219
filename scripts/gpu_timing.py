"""Time every backend: the most important case first, one process per backend, a line per case as it is measured."""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from posenc.bench import lines
from posenc.bench.cases import CACHES, CUDNN, STRATEGIES, BenchCase, kind_shown
from posenc.bench.goals import GPU_DTYPE, GPU_LENGTHS, GPU_SHAPES
from posenc.bench.results import BenchRow
from posenc.bench.settings import BenchSettings
from posenc.bench.summary import ratio
from posenc.plugins import backends
from scripts.gpu_process import Died, Workers

TIME = "scripts.gpu_times:time_case"
LENGTHS = (32768, 131072, 65536, 4096, 8192, 16384)
"""The first three have goals."""

SHORTEST_CACHE = 8192
"""Shortest cache, in tokens, at which decoding is measured: below it, launches dominate a step."""

MAIN_STRATEGY, MAIN_BACKEND = "lampe", "triton"
CASE_SECONDS = 45.0
"""A case that takes longer is taken to hang."""

LAST_CASE = 15.0
"""Seconds reserved at the end for the running case and the file."""

FAR_OFF, FAR_OFF_TWICE = 3.0, 2
"""A backend this many times slower than flash attention alone, in this many cases, is not measured further."""

MOST_DEATHS = 3
"""A backend whose process ended this often is not measured further."""


class Timing:
    """Cases measured one at a time until time is up; cases left out are counted by reason.

    Parameters
    ----------
    file : Path
        File for the lines.
    workers : Workers
        The process of every backend.
    ends : float
        Time of ``time.monotonic()`` by which everything must have ended.
    """

    def __init__(self, file: Path, workers: Workers, ends: float) -> None:
        self.file, self.workers, self.ends = file, workers, ends
        self.began = time.monotonic()
        self.out: dict[str, str] = {}
        self.slow: Counter[tuple[str, str, str]] = Counter()
        self.deaths: Counter[str] = Counter()

    def leave_out(self, backend: str, reason: str) -> None:
        """Exclude a backend from the measurements."""
        self.out[backend] = reason

    def measure(self, smoke: bool) -> None:
        """Measure every case of every backend, in order."""
        for settings in parts(tuple(self.workers), smoke):
            for case in settings.cases():
                reason = self._left_out(case)
                if reason is None:
                    reason = self._case(case, settings)
                if reason is not None:
                    lines.append(self.file, {"left_out": {"backend": case.backend, "reason": reason}})

    def _left_out(self, case: BenchCase) -> str | None:
        """Return why a case is not begun, or None."""
        if case.backend in self.out:
            return self.out[case.backend]
        if self.slow[_work(case)] >= FAR_OFF_TWICE:
            return f"{_shown(case)}: more than {FAR_OFF:g} times flash attention alone, {FAR_OFF_TWICE} times"
        if self.deaths[case.backend] >= MOST_DEATHS:
            return f"its process ended {MOST_DEATHS} times"
        if time.monotonic() >= self.ends - LAST_CASE:
            return "no time was left"
        return None

    def _case(self, case: BenchCase, settings: BenchSettings) -> str | None:
        """Measure a case; return why that failed, or None."""
        worker = self.workers[case.backend]
        options: dict[str, Any] = {"rounds": settings.rounds, "seconds": settings.seconds}
        try:
            left = min(CASE_SECONDS, self.ends - 2 - time.monotonic())
            result = worker.ask(TIME, left, case=asdict(case), **options)
        except Died as error:
            self.deaths[case.backend] += not worker.alive
            self._say(f"{case}: {error}")
            return str(error)
        lines.append(self.file, result)
        row = BenchRow.model_validate(result["row"])
        self.slow[_work(case)] += ratio(row) > FAR_OFF
        self._say(f"{case}: {_described(row)}")
        return None

    def _say(self, message: str) -> None:
        print(f"[{time.monotonic() - self.began:4.0f} s] {message}", file=sys.stderr, flush=True)


def _work(case: BenchCase) -> tuple[str, str, str]:
    return case.backend, case.kind, case.cache


def _shown(case: BenchCase) -> str:
    return kind_shown(case.kind, case.cache)


def _described(row: BenchRow) -> str:
    """Return the numbers of a case in one line."""
    parts = [f"{ratio(row):.2f} of flash alone" if row.baselines else "", f"{row.ratio:.2f} of plain"]
    cudnn = row.over(CUDNN)
    parts += ["" if cudnn is None else f"{cudnn:.2f} of cuDNN alone"]
    parts += ["" if row.memory is None else f"{row.memory.remapped / 2**20:.0f} MiB"]
    return ", ".join(filter(None, parts))


def parts(names: tuple[str, ...], smoke: bool) -> list[BenchSettings]:
    """Return what to time, the most important first, since time may run out."""
    keeping = tuple(name for name in names if name in backends() and backends()[name].capabilities.keeps_keys)
    if smoke:
        tiny = BenchSettings(
            strategies=(MAIN_STRATEGY,), lengths=(64, 128), heads=("4/2x16",), backends=names, rounds=3
        )
        query = replace(tiny, kinds=("query",), caches=("raw",))
        return [tiny, query, replace(query, backends=keeping, caches=("rotated",))]
    base = BenchSettings(
        strategies=(MAIN_STRATEGY,), dtypes=(GPU_DTYPE,), backends=names, device="cuda", rounds=9, seconds=1.5
    )
    others = tuple(name for name in STRATEGIES if name != MAIN_STRATEGY)
    first = tuple(name for name in names if name == MAIN_BACKEND)
    rest = tuple(name for name in names if name != MAIN_BACKEND)
    main_shape, other_shape = GPU_SHAPES[:1], GPU_SHAPES[1:]
    settings = []
    for shapes, strategies, part_backends, lengths in (
        (main_shape, (MAIN_STRATEGY,), names, LENGTHS),
        (other_shape, (MAIN_STRATEGY,), first, LENGTHS),
        (main_shape, others, first, GPU_LENGTHS),
        (other_shape, others, first, GPU_LENGTHS),
        (other_shape, (MAIN_STRATEGY,), rest, LENGTHS),
        (main_shape, others, rest, GPU_LENGTHS),
        (other_shape, others, rest, GPU_LENGTHS),
    ):
        part = replace(base, heads=shapes, strategies=strategies, backends=part_backends, lengths=lengths)
        settings.append(part)
        for cache in CACHES[::-1]:
            capable = part_backends if cache == "raw" else tuple(name for name in part_backends if name in keeping)
            query = replace(part, kinds=("query",), caches=(cache,), backends=capable, rounds=30, seconds=1.0)
            settings.append(replace(query, lengths=tuple(length for length in lengths if length >= SHORTEST_CACHE)))
    return [part for part in settings if part.backends]
