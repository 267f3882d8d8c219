"""Tiles of the Triton kernels tried against each other: candidates, what one computes, and how long it takes.

``scripts.gpu_sweep`` runs these functions in processes of their own.

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
from posenc.bench.cases import WINDOW_SHARE, Heads
from posenc.bench.sampled import aimed_queries, errors, expected_rows, sampled_rows
from posenc.bench.timing import wall
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.kernels.triton.backend import TritonBackend
from posenc.kernels.triton.tiles import Kernel, TileEntry, TileTable, Tiling
from posenc.plugins import strategy

KERNELS: tuple[Kernel, ...] = get_args(Kernel)
STRATEGY = "lampe"
BETTER = 0.98
"""A tiling replaces the shipped one if it takes at most this share of its time: less is noise."""

SHARED_MEMORY = 227 * 1024
"""Bytes that a program may have on an H100."""

POISON = 2 * 2**30
"""Bytes that are filled with NaN before a candidate runs, in each of several processes that share a GPU."""

DESCRIPTORS = (9, 0)
"""Least compute capability with tensor memory accelerators."""


@dataclass(frozen=True)
class Setting:
    """What a tiling is tried on.

    Parameters
    ----------
    shape : str
        Heads, ``HQ/HKVxD``.
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
        """Width of an element."""
        return 8 * cast("int", getattr(torch, self.dtype).itemsize)

    def entry(self, tiling: Tiling, capability: tuple[int, int], source: str) -> TileEntry:
        """The line of a table that has a tiling used here."""
        facts = {"kernel": self.kernel, "capability": capability, "bits": self.bits, "head_dim": self.head_dim}
        return TileEntry.model_validate({**facts, **asdict(tiling), "source": source})


def shipped(setting: Setting, capability: tuple[int, int]) -> Tiling:
    """What the shipped table says."""
    dtype = getattr(torch, setting.dtype)
    return TileTable.shipped().tiling(setting.kernel, capability=capability, dtype=dtype, head_dim=setting.head_dim)


def candidates(setting: Setting, capability: tuple[int, int], most: int) -> list[Tiling]:
    """The shipped tiling, then at most so many others, the likeliest first."""
    first = shipped(setting, capability)
    if setting.device == "cpu":  # interpreted: every program counts
        grid = product((False,), (64,), (4,), (64, 32), (1,))
    elif setting.kernel == "prefill":
        grid = product(
            (True, False) if capability >= DESCRIPTORS else (False,), (128, 64), (8, 4), (128, 64, 32), (3, 2, 4)
        )
    else:  # the queries of one key/value head are few: how many a tile could hold changes nothing
        # The row of a table is loaded before the table: raw keys take two stages for every block on its way.
        stages = (5, 7, 3) if setting.kernel == "decode_raw" else (3, 4, 2)
        grid = product((False,), (first.rows,), (4, 8, 2), (64, 32, 128), stages)
    found = [Tiling(rows, keys, warps, stages, tma) for tma, rows, warps, keys, stages in grid]
    fitting = [tiling for tiling in found if tiling != first and _bytes(setting, tiling) <= SHARED_MEMORY]
    return [first, *fitting[:most]]


def _bytes(setting: Setting, tiling: Tiling) -> int:
    """Shared memory that the tiles take at least."""
    element = setting.head_dim * setting.bits // 8
    queries = tiling.rows if setting.kernel == "prefill" else 0
    return element * (queries + 2 * tiling.stages * tiling.keys)


@dataclass(frozen=True, eq=False)
class Work:
    """One call that every tiling makes, and what it must return."""

    tensors: tuple[Tensor, Tensor, Tensor]
    plan: posenc.PositionPlan
    rotary: posenc.Rotary
    kept: RotatedKeyCache | None
    rows: Any
    expected: tuple[Tensor, Tensor]

    def call(self, backend: TritonBackend) -> tuple[Tensor, Tensor]:
        """The backend's output and logsumexp."""
        options: dict[str, Any] = {}
        if self.kept is not None:
            self.kept.truncate(self.plan.total - 1)
            options["kept"] = self.kept
        q, k, v = self.tensors
        return backend.attend(q, k, v, self.plan, self.rotary, scale=q.shape[-1] ** -0.5, mask=None, **options)


@cache
def work(setting: Setting) -> Work:
    """The call of a setting, made once per process."""
    heads, dtype, length = Heads.parse(setting.shape), getattr(torch, setting.dtype), setting.length
    generator = torch.Generator(setting.device).manual_seed(0)
    q_len = length if setting.kernel == "prefill" else 1
    q, k, v = (
        torch.randn(1, count, tokens, heads.dim, generator=generator, device=setting.device).to(dtype)
        for count, tokens in ((heads.query, q_len), (heads.key, length), (heads.key, length))
    )
    chosen = strategy(STRATEGY, window=length // WINDOW_SHARE, mapping=3 * length // WINDOW_SHARE // 4)
    plan, rotary = chosen.plan(length), posenc.Rotary.from_theta(THETA, heads.dim)
    rows, scale = sampled_rows(plan, q_len, ROWS, 0), heads.dim**-0.5
    aimed_queries(q, k, plan, rotary, rows, scale, 0)
    expected = expected_rows(q, k, v, plan, rotary, rows, scale)
    kept = RotatedKeyCache() if setting.kernel == "decode_kept" else None
    return Work((q, k, v), plan, rotary, kept, rows, expected)


def backend_of(setting: Setting, tiling: Tiling) -> TritonBackend:
    """The backend with one tiling."""
    entry = setting.entry(tiling, capability_of(setting.device), "a candidate")
    return TritonBackend(TileTable.shipped().with_first([entry]))


def capability_of(device: str) -> tuple[int, int]:
    """Of the device; the interpreter runs what an H100 would."""
    return torch.cuda.get_device_capability() if device == "cuda" else DESCRIPTORS


def describe(device: str) -> dict[str, Any]:
    """Facts of the machine, with the compute capability."""
    from posenc.bench.run import began

    return {**began(device)[0], "capability": capability_of(device)}


def verify(setting: dict[str, Any], tiling: dict[str, Any]) -> dict[str, Any]:
    """Compile a tiling by running it once, and hold what it wrote against float64."""
    asked, began = Setting(**setting), time.monotonic()
    case = work(asked)
    with torch.no_grad(), poisoned(asked.device, POISON):
        found = case.call(backend_of(asked, Tiling(**tiling)))
    off = errors(found, case.expected, case.rows, case.plan.total - case.tensors[0].shape[2])
    good = off.output <= TOLERANCES[asked.dtype] and off.lse <= LSE_TOLERANCES[asked.dtype]
    return {"good": good, "output": off.output, "lse": off.lse, "seconds": time.monotonic() - began}


@cache
def timed_call(
    setting: Setting, tiling: Tiling
) -> tuple[Callable[[], Tensor], Callable[[Callable[[], object]], float]]:
    """A tiling's call, warmed up, and its clock."""
    run = partial(_output, work(setting), backend_of(setting, tiling))
    run()
    if setting.device == "cpu":
        return run, wall
    return (run, cuda.events) if setting.kernel == "prefill" else (cuda.record(run), cuda.replayed)


def _output(case: Work, backend: TritonBackend) -> Tensor:
    return case.call(backend)[0]


def one_round(setting: dict[str, Any], tilings: list[dict[str, Any]]) -> list[float]:
    """Seconds of one call of every tiling, in turns."""
    asked = Setting(**setting)
    with torch.no_grad():
        calls = [timed_call(asked, Tiling(**tiling)) for tiling in tilings]
        return [clock(run) for run, clock in calls]


def best(rounds: Iterable[list[float]], tilings: list[Tiling]) -> tuple[Tiling, list[float]]:
    """The fastest by its median where it is better than the first, which is the shipped one; all medians."""
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    fastest = min(range(len(tilings)), key=medians.__getitem__)
    return (tilings[fastest] if medians[fastest] <= BETTER * medians[0] else tilings[0]), medians
