"""Compare xformers' own merge kernel, under Triton's interpreter, with the formula of its stand-in.

It runs in its own process, because the interpreter is chosen before Triton is imported. It prints the largest
differences.
"""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from xformers.ops import fmha

from tests.kernels import stand_ins


def differences(dtype: torch.dtype, count: int) -> tuple[float, float]:
    """Return the differences of output and logsumexp, for slices of larger tensors as the backend passes them."""
    generator = torch.Generator().manual_seed(count)
    outs = [torch.randn(2, 7 + n, 3, 24, generator=generator).to(dtype)[:, n:] for n in range(count)]
    lses = [10 * torch.randn(2, 3, 7 + n, generator=generator)[:, :, n:] for n in range(count)]
    found = fmha.merge_attentions(list(outs), list(lses))
    expected = stand_ins.merge_attentions(outs, lses)
    assert found[0].dtype == dtype
    assert found[0].shape == outs[0].shape
    return tuple(float((a.double() - b.double()).abs().max()) for a, b in zip(found, expected, strict=True))  # type: ignore[return-value]


if __name__ == "__main__":
    # The operator is registered only for CUDA; it wraps Python that launches the kernel.
    fmha.triton_splitk.merge_attentions_varargs = fmha.triton_splitk.merge_attentions_varargs._init_fn
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    print(json.dumps({str(dtype): [differences(dtype, count) for count in (2, 3, 5)] for dtype in dtypes}))
