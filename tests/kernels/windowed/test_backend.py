"""The backends of the CUDA libraries on a machine without CUDA: their plans, and their calls computed densely."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import posenc
import posenc.testing
from posenc.kernels.devices import loadable, on_device
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.kernels.windowed import backend as windowed
from posenc.kernels.windowed import xformers as xformers_segments
from posenc.kernels.windowed import xformers_library
from posenc.kernels.windowed.backend import WindowedBackend, _for_kernel
from posenc.kernels.windowed.bands import Band, band_schedule
from posenc.kernels.windowed.torch_flash import TorchFlashBackend
from posenc.kernels.windowed.xformers import XformersBackend
from posenc.kernels.windowed.xformers_library import NEEDED, find_fmha
from posenc.plan import PositionPlan
from posenc.testing.tensors import AttentionCall, check_result, installed, tensors
from tests.kernels import stand_ins
from tests.kernels.stand_ins import fmha
from tests.kernels.windowed.test_bands import seen


class TestXformers(posenc.testing.BackendContract):
    backend = stand_ins.SimulatedXformers()


class TestTorchFlash(posenc.testing.BackendContract):
    backend = stand_ins.SimulatedTorchFlash()

    @pytest.fixture(autouse=True)
    def _stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("posenc.kernels.windowed.torch_flash.forward", stand_ins.flash_forward)


@pytest.mark.parametrize("backend", stand_ins.WINDOWED)
def test_a_window_open_to_the_right_is_exact(backend: WindowedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of a chunk see less and less of the chunk before."""
    monkeypatch.setattr("posenc.kernels.windowed.torch_flash.forward", stand_ins.flash_forward)
    lengths = posenc.Lengths(64, 64)
    index = lengths.indices
    chunk = index // 32 * 32
    cut = np.minimum(np.maximum(index - 20, 0), chunk)
    bounds = {"far": (index * 0, cut), "before": (cut, chunk), "own": (chunk, index + 1)}
    segments = [posenc.Segment(name, *bound, index, index // (2 + n)) for n, (name, bound) in enumerate(bounds.items())]
    plan = PositionPlan.build(lengths, segments)
    assert any(call.band.left is not None and call.band.right is None for call in band_schedule(plan, 64).calls)
    for dtype in backend.capabilities.dtypes:
        q, k, v = tensors(plan, 64, (4, 2), 8, dtype=dtype)
        call = AttentionCall(q, k, v, plan, posenc.Rotary.from_theta(1e3, 8), 0.5)
        with installed(backend) as name:
            check_result(name, call, *call.run(name), TestXformers.tolerances[dtype])


def shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Return the same numbers, starting ``by`` elements into their memory."""
    memory = x.new_empty(x.numel() + by)[by:].view(x.shape)
    return memory.copy_(x)


def spread(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the same numbers with a gap of one element after every index of a dimension."""
    strides, step = [0] * x.ndim, 1
    for n in reversed(range(x.ndim)):
        strides[n] = step
        step = step * x.shape[n] + (n == dim + 1)
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


@pytest.mark.parametrize("backend", stand_ins.WINDOWED)
@pytest.mark.parametrize("layout", ["shifted by 1", "shifted by 4", "spread 0", "spread 1", "spread 2"])
def test_tensors_that_the_kernels_cannot_load_are_copied(
    backend: WindowedBackend, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raw keys reach the kernel as they are where a segment does not rotate them; values always do."""
    monkeypatch.setattr("posenc.kernels.windowed.torch_flash.forward", stand_ins.flash_forward)
    how, number = layout.rsplit(maxsplit=1)
    index = np.arange(20)
    segments = [posenc.Segment("all", index * 0, index + 1, index, index * 0)]  # keys at 0 are not rotated
    plan = PositionPlan.build(posenc.Lengths(20, 20), segments)
    made = {"shifted by": shifted, "spread": spread}[how]
    q, k, v = (made(x, int(number)) for x in tensors(plan, 20, (4, 2), 16, batch=1, dtype=torch.bfloat16))
    assert not any(loadable(x) for x in (q, k, v))
    call = AttentionCall(q, k, v, plan, posenc.Rotary.from_theta(1e3, 16), 0.5)
    with installed(backend) as name:
        check_result(name, call, *call.run(name), 2e-2)


def test_tensors_that_the_kernels_can_load_are_not_copied() -> None:
    x = torch.randn(2, 3, 40, 16, dtype=torch.float16).transpose(1, 2)[:, ::2]
    assert _for_kernel(x, 16).data_ptr() == x.data_ptr()
    assert _for_kernel(x[..., :8], 8).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("backend", stand_ins.WINDOWED)
def test_every_launch_is_on_the_gpu_of_the_tensors(backend: WindowedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    launches: list[list[torch.device]] = []

    def noted(launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            launches.append(list(current))
            return launch(*arguments, **options)

        return run

    monkeypatch.setattr("posenc.kernels.windowed.torch_flash.forward", stand_ins.flash_forward)
    monkeypatch.setattr("posenc.kernels.windowed.backend.on_device", entered)
    for step in ("window", "merged"):
        monkeypatch.setattr(backend, step, noted(getattr(backend, step)))
    monkeypatch.setattr("posenc.kernels.windowed.backend.rotated_queries", noted(windowed.rotated_queries))
    plan = posenc.strategy("lampe", window=32, mapping=20, head=6, tail=3).plan(40)
    q, k, v = tensors(plan, 40, (4, 2), 16, dtype=torch.bfloat16)
    with installed(backend) as name:
        AttentionCall(q, k, v, plan, posenc.Rotary.from_theta(1e3, 16), 0.5).run(name)
    assert len(launches) > 5
    assert all(held == [q.device] for held in launches)
    assert current == []


def test_the_current_gpu_is_that_of_the_tensors() -> None:
    held = on_device(torch.device("cuda", 1))
    assert isinstance(held, torch.cuda.device)
    assert held.idx == 1
    with on_device(torch.device("cpu")):  # needs no GPU
        pass


@pytest.mark.parametrize("backend", stand_ins.WINDOWED)
def test_decoding_with_cached_rotated_keys_is_exact(backend: WindowedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posenc.kernels.windowed.torch_flash.forward", stand_ins.flash_forward)
    strategy = posenc.strategy("lampe", window=64, mapping=40, head=12, tail=6)
    whole, rotary, kept = strategy.plan(90, 100), posenc.Rotary.from_theta(1e4, 16), RotatedKeyCache()
    q, k, v = tensors(whole, 100, (4, 2), 16, dtype=torch.bfloat16)
    for length in range(91, 101):
        new = q[:, :, length - 1 : length]
        call = AttentionCall(new, k[:, :, :length], v[:, :, :length], whole.prefix(length), rotary, 0.25)
        with installed(backend) as name:
            given = (call.q, call.k, call.v, call.plan, rotary)
            out, lse = posenc.attention(*given, backend=name, scale=0.25, kept=kept, return_lse=True)
        check_result(name, call, out, lse, 2e-2)
    assert kept.bytes > 0


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 12))
def test_xformers_masks_equal_our_bands(rows: int, keys: int, left: int) -> None:
    windows = [(None, 0), (left, 0), (left, None)]
    empty = np.zeros(0, dtype=np.int64)
    for window in windows:
        bias = xformers_segments._bias(fmha.attn_bias, *window, rows + keys)
        mask = bias.materialize((rows, keys)) == 0
        assert np.array_equal(mask.numpy(), seen(Band((0, rows), (0, keys), *window), empty, empty)), window
    assert xformers_segments._bias(fmha.attn_bias, None, None, keys) is None


def test_xformers_has_every_symbol_that_we_use() -> None:
    module, problem = find_fmha()
    assert problem == ""
    for name in NEEDED:
        assert xformers_library.has(module, name), name
    for function, parameters in {
        "memory_efficient_attention_partial": ("query", "key", "value", "attn_bias", "scale"),
        "memory_efficient_attention_forward_requires_grad": ("query", "key", "value", "attn_bias", "scale", "op"),
        "merge_attentions": ("attn_split", "lse_split"),
    }.items():
        assert set(parameters) <= set(inspect.signature(getattr(module, function)).parameters), function
    biases = [xformers_segments._bias(module.attn_bias, left, right, 9) for left, right in ((None, 0), (2, 0))]
    assert {type(bias) for bias in biases} <= set(module.cutlass.FwOp.SUPPORTED_ATTN_BIAS_TYPES)
    biases.append(xformers_segments._bias(module.attn_bias, 2, None, 9))
    assert {type(bias) for bias in biases} <= set(module.flash.FwOp.SUPPORTED_ATTN_BIAS_TYPES)
    assert module.flash.FwOp.SUPPORTS_PARTIAL
    assert module.flash.FwOp.SUPPORTS_BMGHK
    assert not module.cutlass.FwOp.SUPPORTS_PARTIAL  # otherwise float32 could use the same path
    assert torch.float32 in module.cutlass.FwOp.SUPPORTED_DTYPES


def test_this_torch_has_the_operators_that_xformers_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """When imported with a CUDA build of torch, xformers compares their schemas and gives up if they differ."""
    from xformers.ops.fmha import torch_attention_compat

    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    torch_attention_compat.ensure_pt_flash_ok()
    assert torch_attention_compat.is_pt_cutlass_compatible(force=True)


def test_the_merge_of_xformers_equals_its_stand_in() -> None:
    """The real merge is a Triton kernel, run under the interpreter."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.interpret_merge"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    allowed = {"torch.float32": 2e-6, "torch.bfloat16": 1.6e-2, "torch.float16": 2e-3}
    assert found.keys() == allowed.keys()
    for dtype, differences in found.items():
        for out, lse in differences:
            assert out <= allowed[dtype]
            assert lse <= 1e-5


def test_a_package_without_the_symbols_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_library, "HOMES", ("posenc.rope", "no.such.package", "xformers.ops.fmha"))
    assert find_fmha.__wrapped__() == (fmha, "")
    monkeypatch.setattr(xformers_library, "HOMES", ("posenc.rope", "no.such.package"))
    module, problem = find_fmha.__wrapped__()
    assert module is None
    assert "posenc.rope has no memory_efficient_attention_partial; no.such.package: ModuleNotFoundError" in problem


def test_an_absent_library_is_a_reason_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_segments, "find_fmha", lambda: (None, "no module"))
    reason = XformersBackend().unavailable(torch.zeros(1))
    assert reason is not None
    assert "pip install 'posenc[gpu]'" in reason


@pytest.mark.parametrize("name", ["xformers", "torch_flash"])
def test_an_explicit_choice_that_cannot_run_here_raises(name: str) -> None:
    q = torch.randn(1, 2, 4, 8, dtype=torch.bfloat16)
    plan, rotary = posenc.strategy("rope").plan(4), posenc.Rotary.from_theta(1e4, 8)
    with pytest.raises(posenc.BackendError, match=f"{name}.*runs on cuda, not on cpu"):
        posenc.attention(q, q, q, plan, rotary, backend=name)


def test_heads_wider_than_the_kernels_support_are_refused() -> None:
    q = torch.zeros(1, 1, 1, 264, dtype=torch.bfloat16)
    assert "up to 256 channels" in str(stand_ins.SimulatedTorchFlash().refuses(q, q, q, None))


def test_torch_flash_says_what_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, q = TorchFlashBackend(), torch.zeros(1, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert "no flash attention" in str(backend.unavailable(q))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "this GPU has 7.5" in str(backend.unavailable(q))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.unavailable(q) is None
