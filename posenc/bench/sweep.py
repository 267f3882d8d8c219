"""Tiles of the Triton kernels, compared with each other: the candidates, whether one is correct, and its time.

``scripts.gpu_sweep`` runs these functions in separate processes.

Shape letters: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import product
from typing import Any, cast, get_args

import torch
from torch import Tensor

import posenc
from posenc.bench import cuda
from posenc.bench.attention import THETA
from posenc.bench.canary import LSE_TOLERANCES, ROWS, TOLERANCES, poisoned
from posenc.bench.cases import WINDOW_SHARE
from posenc.bench.run import machine_facts
from posenc.bench.sampled import aim_queries, compare_rows, expected_rows, sampled_rows
from posenc.bench.shapes import Heads
from posenc.bench.timing import wall
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.kernels.triton.backend import TritonBackend
from posenc.kernels.triton.tiles import Kernel, TileEntry, TileTable, Tiling
from posenc.plugins import strategy

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
STRATEGY = "lampe"
BETTER = 0.98
"""A tiling replaces the shipped one if it takes at most this share of its time; a smaller gain is noise."""

SHARED_MEMORY = 227 * 1024
"""Bytes that a program may use on an H100."""

POISON = 2 * 2**30
"""Bytes that are filled with NaN before a candidate runs, in each of several processes that share a GPU."""

DESCRIPTORS = (9, 0)
"""Lowest compute capability with tensor memory accelerators."""


@dataclass(frozen=True)
class Setting:
    """The problem that a tiling is tried on.

    Parameters
    ----------
    kernel : str
        A name in ``KERNELS``.
    shape : str
        Heads, ``HQ/HKVxD``.
    length : int
        Tokens.
    dtype, device : str
        Of the tensors.
    """

    kernel: Kernel
    shape: str
    length: int
    dtype: str
    device: str

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return Heads.parse(self.shape).dim

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return 8 * cast("int", getattr(torch, self.dtype).itemsize)

    def entry(self, tiling: Tiling, capability: tuple[int, int], source: str) -> TileEntry:
        """The entry of a tile table that selects a tiling for this problem."""
        facts = {"kernel": self.kernel, "capability": capability, "bits": self.bits, "head_dim": self.head_dim}
        return TileEntry.model_validate({**facts, **asdict(tiling), "source": source})


def shipped(setting: Setting, capability: tuple[int, int]) -> Tiling:
    """Look up the tiling of the shipped table."""
    dtype = getattr(torch, setting.dtype)
    return TileTable.shipped().tiling(setting.kernel, capability=capability, dtype=dtype, head_dim=setting.head_dim)


def candidates(setting: Setting, capability: tuple[int, int], most: int) -> list[Tiling]:
    """List the shipped tiling, then at most ``most`` others, the most promising first."""
    first = shipped(setting, capability)
    if setting.device == "cpu":  # interpreted: every program counts
        grid = product((False,), (64,), (4,), (64, 32), (1,))
    elif setting.kernel == "prefill":
        grid = product(
            (True, False) if capability >= DESCRIPTORS else (False,), (128, 64), (8, 4), (128, 64, 32), (3, 2, 4)
        )
    else:  # the queries of one key/value head are few: how many a tile could hold makes no difference
        grid = product((False,), (first.rows,), (4, 8, 2), (64, 32, 128), (3, 4, 2))
    tilings = [Tiling(rows, keys, warps, stages, tma) for tma, rows, warps, keys, stages in grid]
    fitting = [tiling for tiling in tilings if tiling != first and _least_bytes(setting, tiling) <= SHARED_MEMORY]
    return [first, *fitting[:most]]


def _least_bytes(setting: Setting, tiling: Tiling) -> int:
    """Bytes of shared memory that the tiles take at least."""
    element = setting.head_dim * setting.bits // 8
    queries = tiling.rows if setting.kernel == "prefill" else 0
    return element * (queries + 2 * tiling.stages * tiling.keys)


@dataclass(frozen=True, eq=False)
class SweepWork:
    """One attention call that every tiling makes, and the rows that it must return."""

    tensors: tuple[Tensor, Tensor, Tensor]
    plan: posenc.PositionPlan
    rotary: posenc.Rotary
    rotated_keys: RotatedKeyCache | None
    rows: Any
    expected: tuple[Tensor, Tensor]

    def run(self, backend: TritonBackend) -> tuple[Tensor, Tensor]:
        """Run the backend; returns output and logsumexp."""
        options: dict[str, Any] = {}
        if self.rotated_keys is not None:
            self.rotated_keys.truncate(self.plan.total - 1)
            options["kept"] = self.rotated_keys
        q, k, v = self.tensors
        return backend.attend(q, k, v, self.plan, self.rotary, scale=q.shape[-1] ** -0.5, mask=None, **options)


@cache
def work(setting: Setting) -> SweepWork:
    """Make the call of a setting, once per process."""
    heads, dtype, length = Heads.parse(setting.shape), getattr(torch, setting.dtype), setting.length
    generator = torch.Generator(setting.device).manual_seed(0)
    q_len = length if setting.kernel == "prefill" else 1
    q, k, v = (
        torch.randn(1, count, tokens, heads.dim, generator=generator, device=setting.device).to(dtype)
        for count, tokens in ((heads.query, q_len), (heads.key, length), (heads.key, length))
    )
    remap = strategy(STRATEGY, window=length // WINDOW_SHARE, mapping=3 * length // WINDOW_SHARE // 4)
    plan, rotary = remap.plan(length), posenc.Rotary.from_theta(THETA, heads.dim)
    rows, scale = sampled_rows(plan, q_len, ROWS, 0), heads.dim**-0.5
    aim_queries(q, k, plan, rotary, rows, scale, 0)
    expected = expected_rows(q, k, v, plan, rotary, rows, scale)
    rotated_keys = RotatedKeyCache() if setting.kernel == "decode_kept" else None
    return SweepWork((q, k, v), plan, rotary, rotated_keys, rows, expected)


def backend_of(setting: Setting, tiling: Tiling) -> TritonBackend:
    """Make the backend with one tiling."""
    entry = setting.entry(tiling, capability_of(setting.device), "a candidate")
    return TritonBackend(TileTable.shipped().with_first([entry]))


def capability_of(device: str) -> tuple[int, int]:
    """The compute capability of the device; the interpreter runs the kernels of an H100."""
    return torch.cuda.get_device_capability() if device == "cuda" else DESCRIPTORS


def describe(device: str) -> dict[str, Any]:
    """Describe the machine, with its compute capability."""
    return {**machine_facts(device), "capability": capability_of(device)}


def verify(setting: dict[str, Any], tiling: dict[str, Any]) -> dict[str, Any]:
    """Compile a tiling by running it once, and compare sampled rows of its output with float64."""
    problem, start = Setting(**setting), time.monotonic()
    call = work(problem)
    with torch.no_grad(), poisoned(problem.device, POISON):
        result = call.run(backend_of(problem, Tiling(**tiling)))
    errors = compare_rows(result, call.expected, call.rows, call.plan.total - call.tensors[0].shape[2])
    good = errors.output <= TOLERANCES[problem.dtype] and errors.lse <= LSE_TOLERANCES[problem.dtype]
    return {"good": good, "output": errors.output, "lse": errors.lse, "seconds": time.monotonic() - start}


@cache
def timed_call(
    setting: Setting, tiling: Tiling
) -> tuple[Callable[[], Tensor], Callable[[Callable[[], object]], float]]:
    """Make a tiling's call, already warmed up, and its clock."""
    call = partial(_output, work(setting), backend_of(setting, tiling))
    call()
    if setting.device == "cpu":
        return call, wall
    return (call, cuda.events) if setting.kernel == "prefill" else (cuda.capture(call), cuda.replayed)


def _output(call: SweepWork, backend: TritonBackend) -> Tensor:
    return call.run(backend)[0]


def one_round(setting: dict[str, Any], tilings: list[dict[str, Any]]) -> list[float]:
    """Time one call of every tiling, in turns; returns seconds."""
    problem = Setting(**setting)
    with torch.no_grad():
        calls = [timed_call(problem, Tiling(**tiling)) for tiling in tilings]
        return [clock(call) for call, clock in calls]


def best(rounds: Iterable[list[float]], tilings: list[Tiling]) -> tuple[Tiling, list[float]]:
    """Choose the tiling with the lowest median, or the first, which is shipped, if none beats it; and all medians."""
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    fastest = min(range(len(tilings)), key=medians.__getitem__)
    return (tilings[fastest] if medians[fastest] <= BETTER * medians[0] else tilings[0]), medians
