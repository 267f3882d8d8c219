"""FlashAttention-4: its stand-in under the contract, and the library itself if it is installed."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

import posenc
import posenc.testing
from posenc.kernels.windowed import flash_attn_4
from posenc.kernels.windowed.flash_attn_4 import NEEDED, FlashAttention4Backend, find_forward
from tests.kernels import stand_ins

here = pytest.mark.skipif(
    find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None, reason="flash-attn-4 is not installed"
)

COMPILED = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from posenc.kernels.windowed.flash_attn_4 import FlashAttention4Backend

with FakeTensorMode():  # the kernels are compiled and not launched
    shapes = (1, 100, 8, 128), (1, 200, 2, 128)
    q, k = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
    for left, right in ((None, 0), (31, 0), (31, None), (None, None)):
        out, lse = FlashAttention4Backend().window(q, k, k, left=left, right=right, scale=0.1)
        print(left, right, tuple(out.shape), out.dtype, tuple(lse.shape), lse.dtype)
"""


class TestFlashAttention4(posenc.testing.BackendContract):
    backend = stand_ins.SimulatedFlashAttention4()


@here
def test_the_library_accepts_the_arguments_of_its_stand_in() -> None:
    function, problem = find_forward()
    assert problem == ""
    real, simulated = (inspect.signature(f).parameters for f in (function, stand_ins.flash_attn_func))
    assert list(real)[:3] == list(simulated)[:3] == ["q", "k", "v"]
    assert set(simulated) == {"q", "k", "v", *NEEDED} <= set(real)


@here
def test_every_kind_of_window_compiles_for_hopper() -> None:
    """This needs no GPU and takes a minute on one core."""
    target = {"FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132"}
    command = [sys.executable, "-c", COMPILED]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=580, env=os.environ | target)
    assert ran.returncode == 0, ran.stderr
    shapes = "(1, 100, 8, 128) torch.bfloat16 (1, 8, 100) torch.float32"
    windows = ("None 0", "31 0", "31 None", "None None")
    assert ran.stdout.splitlines() == [f"{window} {shapes}" for window in windows]


@here
def test_the_library_reports_supported_widths() -> None:
    fits = {(9, 128): True, (9, 192): True, (9, 256): True, (9, 264): False, (10, 128): True, (10, 160): False}
    assert {case: flash_attn_4._unfit.__wrapped__(case[0], 0, case[1]) is None for case in fits} == fits


def module_with(function: object) -> SimpleNamespace:
    return SimpleNamespace(flash_attn_func=function)


def test_the_parameters_of_another_release_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(q: object, k: object, v: object, softmax_scale: float, return_lse: bool) -> None: ...

    monkeypatch.setattr(flash_attn_4, "import_module", lambda name: module_with(without))
    assert find_forward.__wrapped__() == (None, "its flash_attn_func takes no window_size")
    monkeypatch.setattr(flash_attn_4, "import_module", lambda name: module_with(stand_ins.flash_attn_func))
    assert find_forward.__wrapped__() == (stand_ins.flash_attn_func, "")


def test_an_absent_library_is_refused_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn_4, "HOME", "no_such.package")
    found = find_forward.__wrapped__()
    monkeypatch.setattr(flash_attn_4, "find_forward", lambda: found)
    reason = str(FlashAttention4Backend().unavailable(torch.zeros(1)))
    assert "ModuleNotFoundError: No module named 'no_such'" in reason
    assert "pip install 'posenc[flash-attn-4]'" in reason


def test_gpus_and_widths_without_a_kernel_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def validate(width: int, value_width: int, major: int, alignment: int) -> None:
        assert (width, value_width, major, alignment) == (128, 128, 9, 8), f"not {width} on {major}"

    class OnCpu(stand_ins.SimulatedFlashAttention4):
        unfit = FlashAttention4Backend.unfit

    interface = {"flash_attn.cute.interface": SimpleNamespace(_validate_head_dims=validate)}
    monkeypatch.setattr(flash_attn_4, "import_module", interface.__getitem__)
    monkeypatch.setattr(flash_attn_4, "_unfit", flash_attn_4._unfit.__wrapped__)
    q, wide = (torch.zeros(1, 1, 1, width, dtype=torch.bfloat16) for width in (124, 136))
    for capability, tensor, expected in (
        ((8, 6), q, "is for compute capability 9, 10 and 11, and this GPU has 8.6"),
        ((9, 0), wide, "FlashAttention-4 refuses: not 136 on 9"),
        ((9, 0), q, None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        reason = OnCpu().refuses(tensor, tensor, tensor, None)
        assert reason is None if expected is None else expected in str(reason)


def test_an_explicit_choice_that_cannot_run_here_raises() -> None:
    q = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16)
    plan, rotary = posenc.strategy("rope").plan(4), posenc.Rotary.from_theta(1e4, 8)
    with pytest.raises(posenc.BackendError, match=r"flash_attn_4.*runs on cuda, not on cpu"):
        posenc.attention(q, q, q, plan, rotary, backend="flash_attn_4")
