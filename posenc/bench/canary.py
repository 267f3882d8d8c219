"""The canary: compare a backend's outputs with float64 at the sizes that are timed, before they are timed.

Contract tests use small sizes. A canary case has the heads, the lengths and the dtype of a timed case. Memory that a
kernel does not write holds NaN, and about a hundred rows are compared (:mod:`posenc.bench.sampled`).

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
from posenc.bench.cases import STRATEGIES, WINDOW_SHARE, BenchCase, kind_shown
from posenc.bench.sampled import RowErrors, aim_queries, compare_rows, expected_rows, sampled_rows
from posenc.bench.shapes import Heads
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.plan import PositionPlan
from posenc.plugins import backends

ROWS = 128
STEPS = 4
"""Tokens that a decoding case decodes one after another; each is compared."""

TOLERANCES = {"float32": 2e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""Largest allowed error of an output, divided by the root mean square of its row.

In float16 and bfloat16 this is 10 and 8 times the dtype's spacing at 1 (2**-10, 2**-7). Three roundings add up: of
rotated queries and keys (a logit of 14 is then off by up to 0.02), of the weights, and of the output, whose channels
reach four times the root mean square. On cpu_flash, which rounds in all three places, errors stay below half of the
tolerance; a wrong key range or position changes a weight of 0.8 by tenths (tests/bench/test_canary.py).
"""

LSE_TOLERANCES = {"float32": 2e-4, "float16": 4e-3, "bfloat16": 3e-2}
"""Largest allowed error of a logsumexp, which is near 14: the error of its largest logit."""

POISON = 6 * 2**30
"""Bytes of device memory that are filled before a case: more than its outputs and copies take at 128k tokens."""

SMALL_BLOCK = 2**19
"""Bytes of a small block: torch's allocator keeps blocks of up to 1 MiB apart from larger ones."""


@dataclass(frozen=True)
class Verdict:
    """The errors of one case, and the errors that are allowed."""

    case: str
    output: float
    lse: float
    output_allowed: float
    lse_allowed: float
    rows: int
    where: str

    @property
    def good(self) -> bool:
        """True if both errors are within their tolerance; NaN never is."""
        return self.output <= self.output_allowed and self.lse <= self.lse_allowed

    def __str__(self) -> str:
        return (
            f"output off by {self.output:.2g} of its row (allowed {self.output_allowed:g}) at {self.where}, "
            f"logsumexp by {self.lse:.2g} (allowed {self.lse_allowed:g}), {self.rows} rows"
        )


def cases(backend: str, device: str, lengths: tuple[int, ...], heads: str, dtypes: tuple[str, ...]) -> list[BenchCase]:
    """List the canary of one backend: its first dtype at every length, the others at the shortest length.

    The cheapest cases, which are also those that fail most often, come first.
    """
    caches = ("raw", "rotated") if backends()[backend].capabilities.keeps_keys else ("raw",)
    sizes = [(length, dtypes[0]) for length in lengths] + [(min(lengths), dtype) for dtype in dtypes[1:]]
    cases = []
    for (length, dtype), strategy in product(sizes, STRATEGIES):
        facts = (heads, dtype, torch.get_num_threads(), length, length // WINDOW_SHARE, strategy, backend, device)
        cases += [BenchCase("query", *facts, cache) for cache in caches]
        cases.append(BenchCase("attention", *facts))
    return cases


def check(case: BenchCase, seed: int = 0) -> Verdict:
    """Run one case and compare sampled rows of its outputs with float64.

    A ``query`` case decodes ``STEPS`` tokens, and every step is compared.
    """
    q, k, v = _random_tensors(case, seed)
    strategy = case.make_strategy()
    decoding = case.kind == "query"
    prompt = case.length - STEPS + 1 if decoding else case.length
    rotary = strategy.rotary(posenc.Rotary.from_theta(THETA, q.shape[-1]), prompt)
    rotated_keys = RotatedKeyCache() if decoding and case.cache == "rotated" else None
    steps: list[RowErrors] = []
    with torch.no_grad():
        for step, total in enumerate(range(prompt, case.length + 1)):
            tensors = q[:, :, step : step + 1] if decoding else q, k[:, :, :total], v[:, :, :total]
            steps.append(_compared(case, tensors, strategy.plan(prompt, total), rotary, rotated_keys, seed + step))
    worst = max(steps, key=lambda errors: errors.output)
    return Verdict(
        case=f"{kind_shown(case.kind, case.cache)} {case.shape} {case.dtype} {case.strategy} {case.length}",
        output=worst.output,
        lse=max(errors.lse for errors in steps),
        output_allowed=TOLERANCES[case.dtype],
        lse_allowed=LSE_TOLERANCES[case.dtype],
        rows=sum(errors.rows for errors in steps),
        where=f"row {worst.row}, head {worst.head}",
    )


def report(case: dict[str, Any]) -> dict[str, Any]:
    """Check one case and return its verdict as plain data, for a worker process."""
    verdict = check(BenchCase(**case))
    if case["device"] == "cuda":
        torch.cuda.empty_cache()  # other processes need the memory
    return {**asdict(verdict), "good": verdict.good, "text": str(verdict)}


def _random_tensors(case: BenchCase, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a case; the queries of a ``query`` case are those of all its steps."""
    heads, dtype = Heads.parse(case.shape), getattr(torch, case.dtype)
    generator = torch.Generator(case.device).manual_seed(seed)

    def random(count: int, length: int) -> Tensor:
        return torch.randn(1, count, length, heads.dim, generator=generator, device=case.device).to(dtype)

    q = random(heads.query, STEPS if case.kind == "query" else case.length)
    return q, random(heads.key, case.length), random(heads.key, case.length)


def _compared(
    case: BenchCase,
    tensors: tuple[Tensor, Tensor, Tensor],
    plan: PositionPlan,
    rotary: posenc.Rotary,
    rotated_keys: RotatedKeyCache | None,
    seed: int,
) -> RowErrors:
    """Aim some queries at keys, run the backend, and compare the rows of these queries."""
    q, k, _ = tensors
    rows, scale = sampled_rows(plan, q.shape[2], ROWS, seed), q.shape[-1] ** -0.5
    aim_queries(q, k, plan, rotary, rows, scale, seed)
    result = _poisoned_attention(case, tensors, plan, rotary, rotated_keys)
    expected = expected_rows(*tensors, plan, rotary, rows, scale)
    return compare_rows(result, expected, rows, plan.total - q.shape[2])


def _poisoned_attention(
    case: BenchCase,
    tensors: tuple[Tensor, Tensor, Tensor],
    plan: PositionPlan,
    rotary: posenc.Rotary,
    rotated_keys: RotatedKeyCache | None,
) -> tuple[Tensor, Tensor]:
    """The backend's output and logsumexp; memory that it does not write holds NaN."""
    with poisoned(case.device):
        result = posenc.attention(*tensors, plan, rotary, backend=case.backend, kept=rotated_keys, return_lse=True)
    if case.device == "cuda":
        torch.cuda.synchronize()
    assert isinstance(result, tuple)
    return result


@contextmanager
def poisoned(device: str, size: int = POISON) -> Iterator[None]:
    """Inside the block, newly allocated memory holds NaN; on a GPU, ``size`` bytes of it.

    On a GPU, large and small blocks are allocated, filled and freed, so that torch's allocator reuses them for the
    next tensors. A value with all bits set is NaN in every floating dtype. On the CPU, torch itself fills new tensors.
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
