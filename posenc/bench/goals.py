"""What remapping is meant to cost at most, on a CPU with two threads and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posenc.bench.cases import MODEL, STRATEGIES
from posenc.bench.results import Row

Measure = Literal["time", "memory", "rate"]
DTYPE = "float32"
THREADS = 2
GPU_DTYPE = "bfloat16"


@dataclass(frozen=True)
class Goal:
    """A limit on one number of one case, for every strategy alike.

    Parameters
    ----------
    measure : {"time", "memory", "rate"}
        Remapped over plain: seconds, peak bytes, or tokens per second (a lower limit).
    """

    kind: str
    shape: str
    length: int
    measure: Measure
    limit: float
    gpu_backend: str | None = None
    """The backend of a goal for GPUs, which are measured in ``GPU_DTYPE``; None for the CPU's."""

    def applies(self, row: Row) -> bool:
        """True for a row that is measured under the conditions of the goal."""
        if (self.kind, self.shape, self.length) != (row.kind, row.shape, row.length):
            return False
        if self.gpu_backend is not None:
            return (row.device, row.dtype, row.backend) == ("cuda", GPU_DTYPE, self.gpu_backend)
        return (row.device, row.dtype, row.threads) == ("cpu", DTYPE, THREADS)

    def value(self, row: Row) -> float | None:
        """The number that the limit is for, or None where it was not measured."""
        if self.measure == "memory":
            return row.memory_ratio
        return 1 / row.ratio if self.measure == "rate" else row.ratio

    def met(self, value: float) -> bool:
        """Whether a number, as it is printed, keeps the limit."""
        shown = round(value, 2)
        return shown >= self.limit if self.measure == "rate" else shown <= self.limit


@dataclass(frozen=True)
class Target:
    """Goals that are shown in one table."""

    title: str
    goals: tuple[Goal, ...]
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


def _gpu_goals(kind: str, limit: float, backend: str) -> tuple[Goal, ...]:
    return tuple(Goal(kind, shape, length, "time", limit, backend) for shape in GPU_SHAPES for length in GPU_LENGTHS)


GPU_TARGETS = (
    Target("`triton`, prefill: time over torch's flash attention", _gpu_goals("attention", 1.10, "triton")),
    Target("`triton`, one query: time over torch's flash attention", _gpu_goals("query", 1.15, "triton")),
    Target("`xformers`, prefill: time over torch's flash attention", _gpu_goals("attention", 1.35, "xformers")),
)
