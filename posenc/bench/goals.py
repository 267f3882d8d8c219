"""Goals: the most that remapping may cost, on a CPU with two threads and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posenc.bench.cases import CACHES, FLASH, STRATEGIES
from posenc.bench.results import BenchRow
from posenc.bench.shapes import MODEL

Measure = Literal["time", "memory", "rate", "alone", "MiB"]
DTYPE = "float32"
THREADS = 2
GPU_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Goal:
    """A limit on one number of one case, the same for every strategy.

    Parameters
    ----------
    kind, shape, length, cache
        The case, as in :class:`posenc.bench.cases.BenchCase`.
    measure : {"time", "memory", "rate", "alone", "MiB"}
        The number that is limited. ``time``, ``memory`` and ``rate`` are remapped over plain: seconds, peak bytes, and
        tokens per second (a lower limit). ``alone`` is seconds over those of torch's flash attention alone. ``MiB`` is
        the peak memory of the remapped side.
    limit : float
        The limit itself.
    gpu_backend : str or None
        The backend of a goal for GPUs, which are measured in ``GPU_DTYPE``; None for a goal for the CPU.
    """

    kind: str
    shape: str
    length: int
    measure: Measure
    limit: float
    gpu_backend: str | None = None
    cache: str = CACHES[0]

    def applies(self, row: BenchRow) -> bool:
        """True for a row that was measured under the conditions of the goal."""
        if (self.kind, self.shape, self.length, self.cache) != (row.kind, row.shape, row.length, row.cache):
            return False
        if self.gpu_backend is not None:
            return (row.device, row.dtype, row.backend) == ("cuda", GPU_DTYPE, self.gpu_backend)
        return (row.device, row.dtype, row.threads) == ("cpu", DTYPE, THREADS)

    def value(self, row: BenchRow) -> float | None:
        """The number that the goal limits; None if it was not measured."""
        if self.measure == "memory":
            return row.memory_ratio
        if self.measure == "alone":
            return row.over(FLASH)
        if self.measure == "MiB":
            return None if row.memory is None else row.memory.remapped / 2**20
        return 1 / row.ratio if self.measure == "rate" else row.ratio

    def met(self, value: float) -> bool:
        """True if a number, rounded as it is printed, is within the limit."""
        rounded = round(value, 2)
        return rounded >= self.limit if self.measure == "rate" else rounded <= self.limit


Goals = tuple[Goal, ...]


@dataclass(frozen=True)
class Target:
    """The goals of one table."""

    title: str
    goals: Goals
    strategies: tuple[str, ...] = STRATEGIES


ATTENTION_LIMITS = {2048: 1.3, 4096: 1.15, 8192: 1.05, 16384: 1.0}
ATTENTION_SHAPES = ("9/3x64", "32/8x128")

TARGETS = (
    Target(
        "Attention, time over plain causal SDPA with its own rotation",
        tuple(
            Goal("attention", shape, length, "time", limit)
            for shape in ATTENTION_SHAPES
            for length, limit in ATTENTION_LIMITS.items()
        ),
    ),
    Target(
        "Attention, peak extra memory over plain's",
        tuple(
            Goal("attention", shape, length, "memory", 1.25)
            for shape in ATTENTION_SHAPES
            for length in ATTENTION_LIMITS
        ),
    ),
    Target(
        "One query over raw keys, time over stock decode attention",
        tuple(Goal("query", shape, 16384, "time", 1.1) for shape in ATTENTION_SHAPES),
    ),
    Target("Model prefill, time over the model not patched", (Goal("prefill", MODEL, 4096, "time", 1.1),)),
    Target(
        "Model decode, tokens per second over those of the model not patched",
        (Goal("decode", MODEL, 8192, "rate", 0.95),),
    ),
    Target(
        "Attention of a padded batch of 4 unequal rows, time over the sum of its rows alone",
        tuple(Goal("padded_attention", shape, 2048, "time", 1.2) for shape in ATTENTION_SHAPES),
    ),
    Target(
        "Model prefill of a padded batch of 4 unequal rows, time over the sum of its rows alone",
        (Goal("padded", MODEL, 2048, "time", 1.2),),
    ),
)

GPU_SHAPES = ("32/8x128", "28/4x128")
GPU_LENGTHS = (32768, 65536, 131072)


PREFILL, DECODE, XFORMERS = 0.80, 1.04, 1.20
"""Time over that of torch's flash attention alone (FlashAttention-2).

Jet-Long (Liu et al. 2026, arXiv 2607.07740) fuses its remap of two windows into one kernel for H100s. Its prefill has
up to 1.39 times the throughput of FlashAttention-2, so 0.72 of its time; its decoding is within 4% of the unmapped
kernel.
"""

DECODE_MIB = 16
"""MiB of peak memory that one query over raw keys may add.

The parts of a split softmax need a few MiB: 64 splits of 32 heads of 128 float32 channels are 1 MiB. A copy of the
keys at 32k tokens would be 64 MiB.
"""


def _gpu_goals(kind: str, limit: float, backend: str, cache: str = CACHES[0], measure: Measure = "alone") -> Goals:
    return tuple(
        Goal(kind, shape, length, measure, limit, backend, cache) for shape in GPU_SHAPES for length in GPU_LENGTHS
    )


GPU_TARGETS = (
    Target("`triton`, prefill: time over flash attention alone", _gpu_goals("attention", PREFILL, "triton")),
    Target(
        "`triton`, one query over raw keys: time over flash attention alone",
        _gpu_goals("query", DECODE, "triton", cache="raw"),
    ),
    Target(
        "`triton`, one query over raw keys: peak extra memory in MiB",
        _gpu_goals("query", DECODE_MIB, "triton", cache="raw", measure="MiB"),
    ),
    Target(
        "`triton`, one query with cached rotated keys: time over flash attention alone",
        _gpu_goals("query", DECODE, "triton"),
    ),
    Target("`xformers`, prefill: time over flash attention alone", _gpu_goals("attention", XFORMERS, "xformers")),
)
