"""Compile the Triton kernels for an H100, which needs no GPU, and print what became of them as JSON lines.

A program of its own, because a process either compiles kernels or interprets them.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import posenc
from posenc.kernels import triton_decode, triton_prefill
from posenc.kernels.triton_backend import TritonBackend


class AbsentH100:
    """What Triton asks its driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Properties:
    shared_memory_per_block_optin = 232_448
    multi_processor_count = 132


def compiled(kernel: JITFunction, case: str, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
    """Compile instead of launching."""
    made = JITFunction.run(kernel, *args, grid=grid, warmup=True, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    products = len(re.findall(r"wgmma\.mma_async|mma\.sync", made.asm["ptx"]))
    facts = {"kernel": kernel.fn.__name__, "case": case, "shared": made.metadata.shared, "stack": int(stack)}
    print(json.dumps({**facts, "tensor_core_instructions": products}), flush=True)


def main() -> None:
    driver.set_active(AbsentH100())
    torch.cuda.get_device_properties = lambda device: Properties  # type: ignore[assignment, return-value]
    plan = posenc.strategy("rerope", window=512).plan(2048)
    rotary = posenc.Rotary.from_theta(1e4, 128)
    kernels = [
        triton_prefill.rotate_keys_kernel,
        triton_prefill.prefill_kernel,
        triton_decode.decode_kernel,
        triton_decode.merge_kernel,
    ]
    for q_len in (2048, 1):
        for kernel in kernels:
            kernel.run = partial(compiled, kernel, f"{q_len} queries")
        q, k, v = (torch.empty(1, heads, n, 128, dtype=torch.bfloat16) for heads, n in ((32, q_len), *[(8, 2048)] * 2))
        TritonBackend().attend(q, k, v, plan, rotary, scale=1.0, mask=None)


if __name__ == "__main__":
    main()
