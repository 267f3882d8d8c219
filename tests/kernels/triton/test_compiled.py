"""The Triton kernels compile for absent GPUs: the interpreter accepts code that the compiler refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is available for Linux only")

from tests.kernels.triton.compile_triton import SHARED, spills_in_loops
from tests.kernels.triton.test_triton import without_interpreter

REGISTERS = 2**16
"""Registers of a multiprocessor, of every compute capability from 8.0 on."""

SCRIPT = Path(__file__).with_name("compile_triton.py")


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernels_compile(capability: int, tmp_path: Path) -> None:
    """With 128 channels in bfloat16, check registers, shared memory, matrix products, and loads ahead of their use."""
    lines = without_interpreter(str(SCRIPT), str(capability), TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    found = [json.loads(line) for line in lines]
    assert {x["kernel"] for x in found} == {"rotate_kernel", "prefill_kernel", "decode_kernel", "merge_kernel"}
    for kernel in found:
        assert kernel["capability"] == capability
        assert kernel["spills_in_loops"] == 0, f"registers are spilled in a loop: {kernel}"
        assert kernel["shared"] <= SHARED[capability], kernel
    (prefill,) = (x for x in found if x["kernel"] == "prefill_kernel")
    kept, raw, paged, looked_up = (only(found, f"decode {keys}") for keys in ("kept", "raw", "paged", "looked up"))
    assert prefill["loops"] >= 3  # before, inside and after the keys that all queries of a block attend
    for kernel in (prefill, kept, raw, paged, looked_up):
        assert kernel["products"] > 0, f"no tensor cores: {kernel}"
        assert kernel["buffers"] >= 2, f"the next block is not fetched while one is used: {kernel}"
    assert prefill["tma"] == (capability >= 90)
    for kernel in (kept, raw, paged, looked_up):  # two programs share the registers and the memory of a multiprocessor
        assert 2 * 32 * kernel["warps"] * kernel["registers"] <= REGISTERS, kernel
        assert 2 * kernel["shared"] <= SHARED[capability], kernel
    for kernel in (raw, paged):
        assert kernel["computed_angles"], f"cos and sin are not instructions of the GPU: {kernel}"


def only(found: list[dict[str, Any]], case: str) -> dict[str, Any]:
    (kernel,) = (x for x in found if x["case"] == case and x["kernel"] == "decode_kernel")
    return kernel


def test_spills_are_counted_only_inside_loops() -> None:
    """The cases are a loop without products, spills before a loop, and a nested loop."""
    code = """
        /*0000*/ STL [R1], R2 ;
        /*0010*/ LDL R2, [R1] ;
        /*0020*/ FADD R1, R1, R2 ;
        /*0030*/ @P0 BRA 0x10 ;
        /*0040*/ MOV R1, R2 ;
        /*0050*/ STL [R1], R2 ;
        /*0060*/ HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0070*/ LDL R2, [R1] ;
        /*0080*/ @P1 BRA 0x60 ;
        /*0090*/ LDL R2, [R1] ;
        /*00a0*/ @P2 BRA 0x40 ;
        /*00b0*/ EXIT ;
    """
    assert spills_in_loops(code) == (1, 1)
    assert spills_in_loops(code.replace("HGMMA", "FFMA")) == (0, 0)
