"""Compile the Triton kernels for a GPU that is not here, and print facts about the results as JSON lines.

    python tests/kernels/triton/compile_triton.py 90                  # 128 channels, bfloat16
    python tests/kernels/triton/compile_triton.py 90 256 float32

This is a separate program because a process either compiles or interprets kernels, and compiles for one GPU only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import posenc
from posenc.kernels.rotated_key_cache import RotatedKeyCache
from posenc.kernels.triton import decode as triton_decode
from posenc.kernels.triton import prefill as triton_prefill
from posenc.kernels.triton import rotate as triton_rotate
from posenc.kernels.triton.backend import TritonBackend

SHARED = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory available to a block, by compute capability."""

KERNELS = (
    triton_rotate.rotate_kernel,
    triton_prefill.prefill_kernel,
    triton_decode.decode_kernel,
    triton_decode.merge_kernel,
)
PRODUCT = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA)\b")
LOCAL = re.compile(r"\b(LDL|STL)\b")
BUFFERS = re.compile(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+(?:x\d+)*x(?:bf16|f16|f32|i32),")
"""Matches the number of blocks in each shared-memory buffer into which loops load ahead."""

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
JUMP = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")


class Absent:
    """The answers that Triton wants of its driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class Properties:
    def __init__(self, capability: int) -> None:
        self.shared_memory_per_block_optin = SHARED[capability]
        self.multi_processor_count = 132


def cuobjdump(*arguments: str) -> str:
    """The output of the CUDA tool that comes with Triton."""
    command = [triton.knobs.nvidia.cuobjdump.path, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def spills_in_loops(sass: str) -> tuple[int, int]:
    """Count local memory accesses inside innermost loops that multiply matrices, and the number of such loops."""
    code = [(int(at, 16), text) for at, text in INSTRUCTION.findall(sass)]
    products = [at for at, text in code if PRODUCT.search(text)]
    jumps = ((at, JUMP.search(text)) for at, text in code)
    loops = [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) <= at]
    loops = [(first, last) for first, last in loops if any(first <= at <= last for at in products)]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    local = [at for at, text in code if LOCAL.search(text)]
    return sum(first <= at <= last for at in local for first, last in inner), len(inner)


def compiled(kernel: JITFunction, case: str, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
    """Compile a kernel instead of launching it, and print the facts."""
    made = JITFunction.run(kernel, *args, grid=grid, warmup=True, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, sass = cuobjdump("-res-usage", file.name), cuobjdump("-sass", file.name)
    spilled, loops = spills_in_loops(sass)
    facts = {
        "kernel": kernel.fn.__name__,
        "case": case,
        "capability": driver.active.get_current_target().arch,
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "spills_in_loops": spilled,
        "loops": loops,
        "shared": made.metadata.shared,
        "warps": made.metadata.num_warps,
        "stages": made.metadata.num_stages,
        "products": len(PRODUCT.findall(sass)),
        "tma": "UTMALDG" in sass,
        "computed_angles": "MUFU.COS" in sass,
        "buffers": min(map(int, BUFFERS.findall(made.asm["ttgir"])), default=0),
    }
    print(json.dumps(facts), flush=True)


def main(capability: int, dim: int = 128, dtype: str = "bfloat16") -> None:
    """Compile every kernel as the backend launches it on a GPU of this capability, at 32/8 heads."""
    driver.set_active(Absent(capability))
    torch.cuda.get_device_properties = lambda device: Properties(capability)  # type: ignore[assignment, return-value]
    torch.cuda.get_device_capability = lambda device: divmod(capability, 10)  # type: ignore[assignment, return-value]
    plan, fractions = (posenc.strategy(name, window=512).plan(2048) for name in ("rerope", "leaky_rerope"))
    rotary = posenc.Rotary.from_theta(1e4, dim)
    for case, q_len, plan_of_case, kept in (
        ("prefill", 2048, plan, None),
        ("decode raw", 1, plan, None),
        ("decode looked up", 1, fractions, None),
        ("decode kept", 1, plan, RotatedKeyCache()),
    ):
        for kernel in KERNELS:
            kernel.run = partial(compiled, kernel, case)
        shapes = ((32, q_len), (8, 2048), (8, 2048))
        q, k, v = (torch.empty(1, heads, tokens, dim, dtype=getattr(torch, dtype)) for heads, tokens in shapes)
        TritonBackend().attend(q, k, v, plan_of_case, rotary, scale=1.0, mask=None, kept=kept)
    for kernel in KERNELS:
        kernel.run = partial(compiled, kernel, "decode paged")
    q_THD, k_PHKD = (torch.empty(shape, dtype=getattr(torch, dtype)) for shape in ((2, 32, dim), (300, 8, 16, dim)))
    table_NM = torch.zeros((2, 128), dtype=torch.int32)
    TritonBackend().attend_paged(q_THD, k_PHKD, k_PHKD, table_NM, (1, 1), (plan, plan), rotary, scale=1.0)


if __name__ == "__main__":
    asked = sys.argv[1:]
    main(int(asked[0]), *map(int, asked[1:2]), *asked[2:3])
