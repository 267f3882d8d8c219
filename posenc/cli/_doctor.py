"""The report of ``posenc doctor``: versions, machine, settings, plugins, backends, self-test."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from posenc.evaluate import model_trial, plugin_trial
from posenc.hf import transformers_names
from posenc.kernels.windowed import xformers_library

PACKAGES = ("posenc", "torch", "transformers", "numpy", "pydantic", "pluggy", "safetensors")
OPTIONAL = (
    "triton",
    "xformers",
    "nvidia-cuda-runtime-cu12",
    "flash-attn",
    "flash-attn-4",
    "accelerate",
    "peft",
    "matplotlib",
    "pytest",
    "hypothesis",
)
SETTINGS = ("POSENC_PLUGINS", "POSENC_BACKEND", "POSENC_TRACE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
"""Environment variables that change what posenc does."""

PASSED = (
    "backends equal the reference; the shipped model is bit-equal under the identity plan and generates the same "
    "tokens, differs under a remap, decodes with a cache like the dense reference, and is restored afterwards"
)


def examine() -> dict[str, Any]:
    """Run all checks; returns the report as plain data."""
    states = plugin_trial.backend_states()
    return {
        "versions": versions(),
        "machine": machine(),
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "plugins": plugins(),
        "backends": {name: text for name, (text, _) in states.items()},
        "self_test": self_test(wrong=[name for name, (_, right) in states.items() if right is False]),
    }


def versions() -> dict[str, str]:
    """List the versions of Python and packages; of optional packages, only those installed."""
    numbers = {"python": platform.python_version()}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            numbers[name] = version(name)
        except PackageNotFoundError:
            if name in PACKAGES:
                numbers[name] = "not installed"
    return numbers


def machine() -> dict[str, Any]:
    """Describe platform, threads, GPUs and attention kernels, and why an installed kernel library is unusable."""
    problem = xformers_library.operators_problem()
    gpus = _gpus()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda or "not in this torch",
        "gpus": gpus,
        "kernels": {
            "torch CPU flash": hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
            "torch CUDA flash": bool(gpus) and torch.backends.cuda.is_flash_attention_available(),
            "triton": _is_installed("triton"),
            "xformers": _is_installed("xformers") and problem is None,
        },
        "notes": [] if problem is None else [problem],
    }


def _gpus() -> list[str]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        gpus.append(f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory:.0f} GiB")
    return gpus


def _is_installed(name: str) -> bool:
    return find_spec(name) is not None


def plugins() -> list[dict[str, Any]]:
    """List every plugin with its version, load time and failures."""
    return [
        {
            "name": record.name,
            "distribution": f"{record.distribution} {record.version}".strip(),
            "seconds": record.seconds,
            "failures": list(record.failures),
        }
        for record in plugin_trial.tried_records()
    ]


def self_test(wrong: list[str]) -> dict[str, Any]:
    """Check the shipped model with :mod:`posenc.evaluate.model_trial`, if all backends are right.

    Parameters
    ----------
    wrong : list of str
        Backends that run here and differ from the reference, or fail.

    Returns
    -------
    dict
        ``passed``, ``reason``, ``checks`` (the failure of each check, None if it passed) and ``seconds``.
    """
    if wrong:
        return {"passed": False, "reason": f"not right: {', '.join(wrong)}", "checks": {}, "seconds": 0.0}
    transformers_names.version()  # imports transformers, which is not part of the test's time
    start = time.perf_counter()
    checks: dict[str, str | None] = {}
    try:
        checks = model_trial.failures()
        reason = next((failure for failure in checks.values() if failure is not None), None)
    except Exception as problem:  # any failure belongs in the report
        reason = f"{type(problem).__name__}: {problem}"
    libraries = " and ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    return {
        "passed": reason is None,
        "reason": PASSED if reason is None else f"{reason} (with {libraries})",
        "checks": checks,
        "seconds": round(time.perf_counter() - start, 2),
    }


def as_text(report: dict[str, Any]) -> str:
    """Format the report for people and for bug reports."""
    lines = ["posenc doctor (paste everything from here on into a bug report)", "", "```text"]
    lines += [f"{name:<13} {text}" for name, text in _facts(report)]
    lines += ["", "backends"]
    lines += [f"  {name:<11} {state}" for name, state in report["backends"].items()] or ["  none"]
    lines += ["plugins"]
    for plugin in report["plugins"]:
        lines.append(f"  {plugin['name']:<11} {plugin['distribution']}, loaded in {plugin['seconds']:.2f} s")
        lines += [f"    FAILED {failure}" for failure in plugin["failures"]]
    test = report["self_test"]
    verdict = "passed" if test["passed"] else "FAILED"
    lines += ["", f"self-test: {verdict} in {test['seconds']:.1f} s, {test['reason']}", "```"]
    return "\n".join(lines)


def _facts(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and text of every line about the installation and the machine."""
    machine = report["machine"]
    kernels = [name for name, present in machine["kernels"].items() if present]
    return [
        *report["versions"].items(),
        ("platform", f"{machine['platform']}, {machine['threads']} threads, {machine['cpu']}"),
        ("cuda", machine["cuda"]),
        *(("gpu", gpu) for gpu in machine["gpus"] or ["none"]),
        ("kernels", ", ".join(kernels) or "none"),
        *(("note", note) for note in machine["notes"]),
        *((name, repr(value)) for name, value in report["settings"].items()),
    ]
