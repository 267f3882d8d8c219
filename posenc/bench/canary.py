"""A backend's outputs at the sizes that are timed, held against float64 before anything is timed.

Contract tests stay small. A canary case has the heads, the lengths and the dtype of a timed case; memory that a kernel
fails to write holds NaN; about a hundred rows are compared (:mod:`posenc.bench.sampled`).

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

import posenc
from posenc.bench.attention import THETA
from posenc.bench.cases import STRATEGIES, WINDOW_SHARE, Case, Heads, kind_shown
from posenc.bench.sampled import Errors, aimed_queries, errors, expected_rows, sampled_rows
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.plan import PositionPlan
from posenc.plugins import backends

ROWS = 128
STEPS = 4
"""Tokens that a decoding case decodes one after the other, each compared."""

TOLERANCES = {"float32": 2e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""Largest error of an output, over the root mean square of its row.

In units of a dtype's spacing at 1 (2**-10, 2**-7) it is 10 and 8. Three roundings meet: that of rotated queries
and keys (a logit of 14 is then off by up to 0.02), that of the weights, and that of the output, whose channels reach
four times the root mean square. Measured on cpu_flash, which rounds in all three places, errors stay below half of
it; a wrong key range or position moves a weight of 0.8 by tenths (tests/bench/test_canary.py).
"""

LSE_TOLERANCES = {"float32": 2e-4, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest error of a logsumexp, which is near 14: that of its largest logit."""

POISON = 6 * 2**30
"""Bytes of device memory that are filled before a case: more than the outputs and copies of one at 128k tokens."""

SMALL_BLOCK = 2**19
"""torch keeps blocks of up to 1 MiB apart from larger ones."""


@dataclass(frozen=True)
class Verdict:
    """One case's errors and what was allowed."""

    case: str
    output: float
    lse: float
    output_allowed: float
    lse_allowed: float
    rows: int
    where: str

    @property
    def good(self) -> bool:
        """True where both errors are allowed; a NaN never is."""
        return self.output <= self.output_allowed and self.lse <= self.lse_allowed

    def __str__(self) -> str:
        return (
            f"output off by {self.output:.2g} of its row (allowed {self.output_allowed:g}) at {self.where}, "
            f"logsumexp by {self.lse:.2g} (allowed {self.lse_allowed:g}), {self.rows} rows"
        )


def cases(backend: str, device: str, lengths: tuple[int, ...], heads: str, dtypes: tuple[str, ...]) -> list[Case]:
    """The canary of one backend: its first dtype at every length, the others at the shortest length.

    What costs least and breaks most often comes first.
    """
    caches = ("raw", "rotated") if backends()[backend].capabilities.keeps_keys else ("raw",)
    sizes = [(length, dtypes[0]) for length in lengths] + [(min(lengths), dtype) for dtype in dtypes[1:]]
    found = []
    for (length, dtype), strategy in product(sizes, STRATEGIES):
        facts = (heads, dtype, torch.get_num_threads(), length, length // WINDOW_SHARE, strategy, backend, device)
        found += [Case("query", *facts, cache) for cache in caches]
        found.append(Case("attention", *facts))
    return found


def check(case: Case, seed: int = 0) -> Verdict:
    """Run one case and compare it."""
    heads, dtype = Heads.parse(case.shape), getattr(torch, case.dtype)
    generator = torch.Generator(case.device).manual_seed(seed)
    one = case.kind == "query"
    q, k, v = (
        torch.randn(1, count, length, heads.dim, generator=generator, device=case.device).to(dtype)
        for count, length in (
            (heads.query, STEPS if one else case.length),
            (heads.key, case.length),
            (heads.key, case.length),
        )
    )
    strategy = case.make_strategy()
    prompt = case.length - STEPS + 1 if one else case.length
    rotary = strategy.rotary(posenc.Rotary.from_theta(THETA, heads.dim), prompt)
    kept = RotatedKeyCache() if one and case.cache == "rotated" else None
    found: list[Errors] = []
    seen = 0
    with torch.no_grad():
        for total in range(prompt, case.length + 1):
            step = total - prompt
            own = q[:, :, step : step + 1] if one else q
            plan = strategy.plan(prompt, total)
            rows = sampled_rows(plan, own.shape[2], ROWS, seed)
            scale = heads.dim**-0.5
            aimed_queries(own, k[:, :, :total], plan, rotary, rows, scale, seed + step)
            tensors = own, k[:, :, :total], v[:, :, :total]
            out = _poisoned(case, tensors, plan, rotary, kept)
            expected = expected_rows(*tensors, plan, rotary, rows, scale)
            found.append(errors(out, expected, rows, total - own.shape[2]))
            seen += len(rows)
    worst = max(found, key=lambda e: e.output)
    return Verdict(
        case=f"{kind_shown(case.kind, case.cache)} {case.shape} {case.dtype} {case.strategy} {case.length}",
        output=worst.output,
        lse=max(e.lse for e in found),
        output_allowed=TOLERANCES[case.dtype],
        lse_allowed=LSE_TOLERANCES[case.dtype],
        rows=seen,
        where=f"row {worst.row}, head {worst.head}",
    )


def report(case: dict[str, Any]) -> dict[str, Any]:
    """One case's verdict as plain data."""
    verdict = check(Case(**case))
    if case["device"] == "cuda":
        torch.cuda.empty_cache()  # other processes need the memory
    return {**asdict(verdict), "good": verdict.good, "text": str(verdict)}


def _poisoned(
    case: Case,
    tensors: tuple[Tensor, Tensor, Tensor],
    plan: PositionPlan,
    rotary: posenc.Rotary,
    kept: RotatedKeyCache | None,
) -> tuple[Tensor, Tensor]:
    """The backend's output and logsumexp, where memory that it leaves unwritten is NaN."""
    with poisoned(case.device):
        found = posenc.attention(*tensors, plan, rotary, backend=case.backend, kept=kept, return_lse=True)
    if case.device == "cuda":
        torch.cuda.synchronize()
    assert isinstance(found, tuple)
    return found


@contextmanager
def poisoned(device: str, size: int = POISON) -> Iterator[None]:
    """Memory that is handed out holds NaN, ``size`` bytes of it on a GPU.

    On a GPU it is what torch's allocator keeps for the next tensors: large and small blocks are taken, filled and
    given back. All bits set is NaN in every floating dtype. On the CPU torch itself fills new tensors.
    """
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        large = torch.full((min(size, free // 4),), 255, dtype=torch.uint8, device=device)
        small = [torch.full((SMALL_BLOCK,), 255, dtype=torch.uint8, device=device) for _ in range(64)]
        del large, small
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
