"""Find xformers' attention code as it is installed, and see whether its compiled operators can load.

The wheel of xformers 0.0.35 on PyPI is linked to the runtime library of CUDA 12, and a torch for CUDA 13 brings only
the runtime of CUDA 13. xformers is then imported without an error, but every operator says that it was not built for
CUDA. ``posenc[gpu]`` installs the missing library, and :func:`load_runtime` loads it first.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

HOMES = ("mslk.attention.fmha", "xformers.ops.fmha")
"""Modules that may hold the code, the newest first; a package can be installed without it."""

NEEDED = (
    "memory_efficient_attention_partial",
    "memory_efficient_attention_forward_requires_grad",
    "merge_attentions",
    "attn_bias.LowerTriangularFromBottomRightMask",
    "attn_bias.LowerTriangularFromBottomRightLocalAttentionMask",
    "attn_bias.LocalAttentionFromBottomRightMask",
    "common.Inputs",
    "cutlass.FwOp",
    "flash.FwOp",
)
"""Every symbol of the module that is used."""

RUNTIME = "libcudart.so.12"
WHEEL = "nvidia-cuda-runtime-cu12"
"""The library that xformers is linked to, and the distribution that holds it."""


@cache
def find_fmha() -> tuple[Any, str]:
    """The module that holds the attention code and "", or None and why there is none."""
    load_runtime()
    problems = []
    for home in HOMES:
        try:
            with _without_flash_attn_4():
                module = import_module(home)
        except Exception as error:  # a build for another CUDA or torch fails in many ways
            problems.append(f"{home}: {type(error).__name__}: {error}")
            continue
        missing = [name for name in NEEDED if not has(module, name)]
        if not missing:
            return module, ""
        problems.append(f"{home} has no {missing[0]}")
    return None, "; ".join(problems)


@contextmanager
def _without_flash_attn_4() -> Iterator[None]:
    """Hide the package ``flash_attn`` where only FlashAttention-4 lives in it.

    xformers takes any ``flash_attn`` for FlashAttention-2 and cannot be imported beside that one; without it, it runs
    torch's own.
    """
    if find_spec("flash_attn") is None or find_spec("flash_attn.flash_attn_interface") is not None:
        yield
        return
    loaded = sys.modules.get("flash_attn")
    sys.modules["flash_attn"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop("flash_attn")
        if loaded is not None:
            sys.modules["flash_attn"] = loaded


def has(module: Any, dotted: str) -> bool:
    """Whether a module has an attribute of an attribute."""
    for name in dotted.split("."):
        module = getattr(module, name, None)
    return module is not None


@cache
def load_runtime() -> None:
    """Load the runtime of CUDA 12 from its wheel, where this torch computes with another CUDA and nothing else has it.

    Beside torch's own runtime it is harmless: the symbols of both carry their versions.
    """
    if torch.version.cuda is None or _loads(RUNTIME):
        return
    try:
        wheel = distribution(WHEEL)
    except PackageNotFoundError:
        return  # operators_problem says so where it matters
    _loads(str(Path(str(wheel.locate_file("nvidia/cuda_runtime/lib"))) / RUNTIME))


def _loads(library: str) -> bool:
    """Load a library if it is not loaded yet, and say whether that worked; the loader searches by name."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@cache
def operators_problem() -> str | None:
    """Why the compiled operators of xformers cannot load here, and what to do; None if they can or there are none.

    This imports ``xformers``, but not its attention code.
    """
    if find_spec("xformers") is None:
        return None
    load_runtime()
    try:
        failure = import_module("xformers._cpp_lib")._cpp_library_load_exception
    except Exception as error:  # a build for another CUDA or torch fails in many ways
        failure = error
    if failure is None:
        return None
    begin = "the operators of xformers cannot load"
    if torch.version.cuda is None:
        return f"{begin}: this torch computes without CUDA; install one with it"
    cause = _first_cause(failure)
    if RUNTIME in cause:
        return (
            f"{begin}: they are built for CUDA 12 and need {RUNTIME}, which torch for CUDA {torch.version.cuda} does "
            f"not bring; pip install {WHEEL}"
        )
    return f"{begin}: {cause}; install the release of xformers that is made for torch {torch.__version__}"


def _first_cause(error: BaseException) -> str:
    """The message of the first in a chain of errors, without the folders of files: it goes into bug reports."""
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\S*/", "", str(error).strip()) or type(error).__name__
