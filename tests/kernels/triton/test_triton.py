"""The Triton kernels beyond the public contract (tests/contract), on a GPU if there is one, else interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import posenc
from posenc.plan import PositionPlan
from posenc.positions import FrequencyStrategy
from posenc.rope import Rotary
from posenc.segment import Lengths, Segment
from posenc.testing.generators import banded_plan
from posenc.testing.tensors import AttentionCall, check_result, tensors

pytest.importorskip("triton", reason="triton is available for Linux only")

from posenc.kernels.triton import backend as triton_backend
from posenc.kernels.triton import decode as triton_decode
from posenc.kernels.triton import mode as triton_mode
from posenc.kernels.triton.angles import LEAST

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = ((3, 3), (6, 2), (4, 1), (8, 1), (7, 1))
STRATEGIES = [name for name, info in posenc.strategies().items() if not issubclass(info.factory, FrequencyStrategy)]
PARAMS = {
    "lampe": {"mapping": 40},
    "auto": {"calibration": {"ranges": [{"up_to": 999, "pick": {"strategy": "dca", "because": "a test"}}]}},
}
TOLERANCES = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 3e-2}
"""Three times the usual for bfloat16: the interpreter truncates queries and keys where a GPU rounds them."""


def check(plan: PositionPlan, q_len: int, heads: tuple[int, int], rotary: Rotary, dim: int, **options: object) -> None:
    dtype = options.pop("dtype", torch.float32)
    assert isinstance(dtype, torch.dtype)
    q, k, v = tensors(plan, q_len, heads, dim, batch=1, dtype=dtype, device=DEVICE)
    call = AttentionCall(q, k, v, plan, rotary, dim**-0.5, **options)  # type: ignore[arg-type]
    check_result("triton", call, *call.run("triton"), TOLERANCES[dtype])


@pytest.mark.parametrize(("number", "name"), list(enumerate(STRATEGIES)))
def test_every_strategy_is_exact_in_half_precision(number: int, name: str) -> None:
    plan = posenc.strategy(name, window=64, **PARAMS.get(name, {})).plan(150, 170)
    dtype = torch.bfloat16 if number % 3 == 2 else torch.float16
    for q_len in (170, 41, 3):
        check(plan, q_len, HEADS[number % len(HEADS)], Rotary.from_theta(1e4, 16), 16, dtype=dtype)


@pytest.mark.parametrize("heads", [*HEADS, (24, 1)])
@pytest.mark.parametrize("q_len", [1, 5, 16, 17])
def test_queries_that_share_keys_are_packed(heads: tuple[int, int], q_len: int) -> None:
    check(banded_plan(37), q_len, heads, Rotary.from_theta(1e3, 8), 8)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(
    ("dim", "channels"), [(32, (0, 32)), (80, (0, 32)), (80, (48, 80)), (96, (0, 96)), (40, (8, 24))]
)
def test_every_layout_of_the_rotated_channels_is_exact(style: str, dim: int, channels: tuple[int, int]) -> None:
    rotary = Rotary.from_theta(1e3, channels[1] - channels[0], style=style, channels=channels)
    for q_len in (40, 2):
        check(banded_plan(40), q_len, (4, 2), rotary, dim)


def test_values_of_another_width_and_softcaps_are_exact() -> None:
    plan, rotary = banded_plan(50), Rotary.from_theta(1e3, 16, channels=(32, 48), style="interleaved")
    for q_len in (50, 4):
        q, k, v = tensors(plan, q_len, (4, 2), 48, device=DEVICE)
        call = AttentionCall(q, k, v[..., :20], plan, rotary, 0.3, softcap=2.0)
        check_result("triton", call, *call.run("triton"), 2e-5)


def test_tensors_are_taken_as_they_lie() -> None:
    """Heads after tokens, as projections make them, and keys in a longer cache."""
    plan, rotary = banded_plan(45), Rotary.from_theta(1e3, 16)
    for q_len in (45, 3):
        q, k, v = tensors(plan, q_len, (4, 2), 16, device=DEVICE)
        room_k, room_v = (torch.full((2, 2, 64, 32), torch.nan, device=DEVICE) for _ in range(2))
        room_k[:, :, 7:52, ::2], room_v[:, :, 7:52, :16] = k, v
        apart = q.transpose(1, 2).contiguous().transpose(1, 2)
        call = AttentionCall(apart, room_k[:, :, 7:52, ::2], room_v[:, :, 7:52, :16], plan, rotary, 0.25)
        assert not call.k.is_contiguous()
        check_result("triton", call, *call.run("triton"), 2e-5)


def test_rows_may_have_their_own_plans() -> None:
    strategy, rotary = posenc.strategy("rerope", window=64, window_size=7), Rotary.from_theta(1e4, 8)
    plans = [strategy.plan(50, 60), strategy.plan(20, 60), posenc.strategy("streaming_llm", window=32).plan(60)]
    for q_len in (60, 2):
        q, k, v = tensors(plans[0], q_len, (4, 2), 8, batch=3, device=DEVICE)
        out, lse = posenc.attention(q, k, v, plans, rotary, backend="triton", return_lse=True)
        for row, plan in enumerate(plans):
            own = slice(row, row + 1)
            call = AttentionCall(q[own], k[own], v[own], plan, rotary, 8**-0.5)
            check_result(f"row {row}", call, out[own], lse[own], 2e-5)


@pytest.mark.parametrize("q_len", [100, 9])
def test_gaps_and_rows_without_keys_are_exact(q_len: int) -> None:
    """Intervals jump, end early, or are empty for some queries of a block."""
    index = np.arange(100)
    far = Segment("far", index * 0, np.where(index < 93, 0, 3), index / 3, index * 0.5)
    steps = Segment("steps", index // 20 * 20, np.where(index % 3 > 0, 0, index + 1), index, index + 9)
    steps = Segment("steps", steps.key_start, np.maximum.accumulate(steps.key_stop), index, index + 9)
    late = Segment("late", index * 0 + 3, np.maximum(index // 20 * 20 - 5, 3), -index, index // 2)
    sudden = Segment("sudden", index * 0, np.where(index < 70, 0, 60), index, index)
    none = Segment("none", index * 0, np.minimum(index, 1), index, index)
    first = Segment("first", index, np.where(index, index, 1), index, index)
    for segments in ([far, steps, late], [sudden], [none], [first]):
        plan = PositionPlan.build(Lengths(100, 100), segments, query_scale=1 + index / 50)
        check(plan, q_len, (2, 1), Rotary.from_theta(1e2, 8), 8)


def test_splits_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, rotary = posenc.strategy("dca", window=64).plan(220), Rotary.from_theta(1e4, 16)
    q, k, v = tensors(plan, 2, (4, 2), 16, device=DEVICE)
    call = AttentionCall(q, k, v, plan, rotary, 0.25)
    merged: list[int] = []
    monkeypatch.setattr(triton_decode, "merge_kernel", _Counted(triton_decode.merge_kernel, merged))
    for most in (1, 64):
        monkeypatch.setattr(triton_decode, "MOST_SPLITS", most)
        check_result(f"at most {most} splits", call, *call.run("triton"), 2e-5)
    assert len(merged) == 1


class _Counted:
    """A kernel that records its launches."""

    def __init__(self, kernel: object, launches: list[int]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self.launches.append(grid[0])
        return self.kernel[grid]  # type: ignore[index]


def test_backends_share_a_plan() -> None:
    """No backend takes what another one keeps on a plan for its own."""
    for order in (("auto", "triton"), ("triton", "auto")):
        plan, rotary = banded_plan(30), Rotary.from_theta(1e3, 8)
        q, k, v = tensors(plan, 30, (4, 2), 8, device=DEVICE)
        for q_len in (30, 2):
            call = AttentionCall(q[:, :, -q_len:], k, v, plan, rotary, 0.3)
            for name in order:
                check_result(name, call, *call.run(name), 2e-5)


def test_a_decoding_step_makes_tables_for_its_queries_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    tables = Rotary.tables

    def noted(self: Rotary, positions: np.ndarray, **options: object) -> object:
        made.append(len(positions))
        return tables(self, positions, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Rotary, "tables", noted)
    plan, rotary = posenc.strategy("lampe", window=64, mapping=40).plan(150, 200), Rotary.from_theta(1e4, 8)
    halves = replace(plan, segments=tuple(replace(s, key_positions=s.key_positions / 2) for s in plan.segments))
    for whole, tables_of_keys in ((plan, []), (halves, [200, 200, 200])):
        made.clear()
        for total in (160, 161, 162):
            step = whole.prefix(total).clipped(155).suffix(9)
            for _ in range(2):  # layers
                check(step, 1, (2, 1), rotary, 8)
        # A step adds its queries in three segments; angles of whole positions are computed, halves have tables.
        assert made == [*tables_of_keys, 3, 3, 3]
    made.clear()
    check(plan.prefix(162).clipped(155).suffix(9), 30, (2, 1), rotary, 8)
    assert made[0] == LEAST  # one table by position serves the keys of every map


def test_unsupported_cases_are_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, rotary = banded_plan(9), Rotary.from_theta(1e4, 8)
    q = torch.randn(1, 2, 9, 264, device=DEVICE)
    with pytest.raises(posenc.BackendError, match="at most 256 channels, not 264"):
        posenc.attention(q, q, q, plan, rotary, backend="triton")
    q = torch.zeros(1, 1, 9, 8, device=DEVICE).expand(65536, 1, 9, 8)
    with pytest.raises(posenc.BackendError, match="65535 heads"):
        posenc.attention(q, q, q, plan, rotary, backend="triton")
    q = q[:1]
    with pytest.raises(posenc.InvalidInputError, match=r"channels 0\.\.15, but the head has 8"):
        posenc.attention(q, q, q, plan, Rotary.from_theta(1e4, 16), backend="triton")
    monkeypatch.setattr(triton_backend, "_installed", lambda: False)
    with pytest.raises(posenc.BackendError, match=r"triton is not installed .*posenc\[triton\]"):
        posenc.attention(q, q, q, plan, rotary, backend="triton")
    posenc.attention(q, q, q, plan, rotary)


def test_an_older_interpreter_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 converts arrays of one element to integers, which is an error from numpy 2.4 on."""
    for release, mended in (("3.6.0", True), ("3.7.1", False)):
        monkeypatch.setattr(triton_mode, "version", {"triton": release}.__getitem__)
        scope = SimpleNamespace(set_attr=setattr)
        stock = SimpleNamespace(
            _patch_lang_tensor=lambda tensor, scope: scope.set_attr(tensor, "__index__", lambda x: int(x.handle.data))
        )
        triton_mode.mend_interpreter(stock)
        scalar = type("Scalar", (), {"handle": SimpleNamespace(data=np.array([[3]]))})
        stock._patch_lang_tensor(scalar, scope)
        if mended:
            assert list(range(scalar())) == [0, 1, 2]  # type: ignore[call-overload]
        else:
            with pytest.raises(TypeError):
                range(scalar())  # type: ignore[call-overload]


def without_interpreter(*arguments: str, **variables: str) -> str:
    """The output of a Python process that compiles kernels instead of interpreting them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(DEVICE == "cuda", reason="this test is about machines without a GPU")
def test_without_a_gpu_the_backend_is_listed_and_refuses() -> None:
    program = """
import sys, torch, posenc
assert "triton" in posenc.backends() and posenc.backends()["triton"].capabilities.devices == ("cuda",)
q = torch.randn(1, 2, 9, 8)
try:
    posenc.attention(q, q, q, posenc.strategy("rope").plan(9), posenc.Rotary.from_theta(1e4, 8), backend="triton")
except posenc.BackendError as error:
    print(error)
assert "triton" not in sys.modules and not torch.cuda.is_initialized()
"""
    assert "cannot run this case: it runs on cuda, not on cpu. Choose another" in without_interpreter("-c", program)
