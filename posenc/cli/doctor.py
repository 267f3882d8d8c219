"""``posenc doctor``: does it run here, and what to paste into a bug report."""

from __future__ import annotations

from typing import Any

import click

from posenc.cli._output import json_option, print_json

PACKAGES = ("posenc", "torch", "transformers", "numpy", "pydantic", "pluggy", "safetensors")
RIGHT = (
    "backends equal the reference; the shipped model is bit-equal under the identity plan and generates the same "
    "tokens, differs under a remap, decodes with a cache what the dense reference gives, and is itself again afterwards"
)
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


@click.command("doctor", short_help="Check whether posenc runs here.")
@json_option
def command(as_json: bool) -> None:
    """Check versions, backends, plugins and a self-test of a few seconds; exit status 1 if the self-test fails.

    The report names no path, user or host: paste it into a bug report as it is.
    """
    from posenc.trace import quiet

    with quiet("posenc", "xformers"):  # what fails is part of the report
        report = examine()
    if as_json:
        print_json(report)
    else:
        click.echo(as_text(report))
    if not report["self_test"]["passed"]:
        raise SystemExit(1)


def examine() -> dict[str, Any]:
    """Everything the report says, as plain data."""
    from posenc.evaluate import plugin_trial as trial

    states = trial.backend_states()
    return {
        "versions": versions(),
        "machine": machine(),
        "settings": settings(),
        "plugins": plugins(),
        "backends": {name: text for name, (text, _) in states.items()},
        "self_test": self_test(wrong=[name for name, (_, right) in states.items() if right is False]),
    }


def versions() -> dict[str, str]:
    """Versions of what computes; of optional packages only those installed."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *OPTIONAL):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name in PACKAGES:
                found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Platform, threads, GPUs, the attention kernels at hand, and why one that is installed is none of them."""
    import platform

    import torch

    from posenc.kernels.windowed.xformers_library import operators_problem

    unusable = operators_problem()
    gpus = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = facts.total_memory / 2**30
        gpus.append(f"{facts.name}, compute capability {facts.major}.{facts.minor}, {memory:.0f} GiB")
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda or "not in this torch",
        "gpus": gpus,
        "kernels": {
            "torch CPU flash": hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"),
            "torch CUDA flash": bool(gpus) and torch.backends.cuda.is_flash_attention_available(),
            "triton": _importable("triton"),
            "xformers": _importable("xformers") and unusable is None,
        },
        "notes": [] if unusable is None else [unusable],
    }


def settings() -> dict[str, str]:
    """Environment variables that change what posenc does."""
    import os

    shown = ("POSENC_PLUGINS", "POSENC_BACKEND", "POSENC_TRACE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    return {name: os.environ[name] for name in shown if name in os.environ}


def plugins() -> list[dict[str, Any]]:
    """Every plugin with its version, load time and failures."""
    from posenc.evaluate.plugin_trial import tried_records

    return [
        {
            "name": record.name,
            "distribution": f"{record.distribution} {record.version}".strip(),
            "seconds": record.seconds,
            "failures": list(record.failures),
        }
        for record in tried_records()
    ]


def self_test(wrong: list[str]) -> dict[str, Any]:
    """Whether the backends are right, and what :mod:`posenc.evaluate.model_trial` finds.

    Parameters
    ----------
    wrong : list of str
        Backends that run here and differ from the reference, or fail.
    """
    import time

    from posenc.evaluate.model_trial import failures
    from posenc.hf.transformers_names import version

    version()  # importing transformers is no part of the test's time
    began = time.perf_counter()
    if wrong:
        return {"passed": False, "reason": f"not right: {', '.join(wrong)}", "checks": {}, "seconds": 0.0}
    checks: dict[str, str | None] = {}
    try:
        checks = failures()
        reason = next((failure for failure in checks.values() if failure is not None), None)
    except Exception as problem:  # whatever goes wrong is what the report is for
        reason = f"{type(problem).__name__}: {problem}"
    return {
        "passed": reason is None,
        "reason": f"{reason} (with {_computing()})" if reason is not None else RIGHT,
        "checks": checks,
        "seconds": round(time.perf_counter() - began, 2),
    }


def _computing() -> str:
    from importlib.metadata import version

    return " and ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))


def as_text(report: dict[str, Any]) -> str:
    """The report for people, and for bug reports."""
    machine, test = report["machine"], report["self_test"]
    lines = ["posenc doctor (paste everything from here on into a bug report)", "", "```text"]
    lines += [f"{name:<13} {version}" for name, version in report["versions"].items()]
    lines += [f"{'platform':<13} {machine['platform']}, {machine['threads']} threads, {machine['cpu']}"]
    lines += [f"{'cuda':<13} {machine['cuda']}"]
    lines += [f"{'gpu':<13} {gpu}" for gpu in machine["gpus"] or ["none"]]
    present = [name for name, there in machine["kernels"].items() if there]
    lines += [f"{'kernels':<13} {', '.join(present) or 'none'}"]
    lines += [f"{'note':<13} {note}" for note in machine["notes"]]
    lines += [f"{name:<13} {value!r}" for name, value in report["settings"].items()]
    lines += ["", "backends"]
    lines += [f"  {name:<11} {state}" for name, state in report["backends"].items()] or ["  none"]
    lines += ["plugins"]
    for plugin in report["plugins"]:
        lines.append(f"  {plugin['name']:<11} {plugin['distribution']}, loaded in {plugin['seconds']:.2f} s")
        lines += [f"    FAILED {failure}" for failure in plugin["failures"]]
    verdict = "passed" if test["passed"] else "FAILED"
    lines += ["", f"self-test: {verdict} in {test['seconds']:.1f} s, {test['reason']}", "```"]
    return "\n".join(lines)


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None
