"""``posenc doctor``: does it run here, and what to paste into a bug report."""

from __future__ import annotations

from typing import Any

import click

from posenc.cli._output import json_option, print_json

TOLERANCE = 2e-5


@click.command("doctor", short_help="Check whether posenc runs here.")
@json_option
def command(as_json: bool) -> None:
    """Check versions, backends, plugins and a two-second self-test; exit status 1 if the self-test fails."""
    import logging

    logging.getLogger("posenc").setLevel(logging.ERROR)  # plugin failures are part of the report
    report = examine()
    if as_json:
        print_json(report)
    else:
        click.echo(as_text(report))
    if not report["self_test"]["passed"]:
        raise SystemExit(1)


def examine() -> dict[str, Any]:
    """Everything the report says, as plain data."""
    return {
        "versions": versions(),
        "machine": machine(),
        "plugins_failed": plugins_failed(),
        "backends": backends(),
        "self_test": self_test(),
    }


def versions() -> dict[str, str]:
    """Versions of what computes."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("posenc", "torch", "transformers", "numpy", "matplotlib"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Platform, threads and GPUs."""
    import platform

    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"platform": f"{platform.system()} {platform.machine()}", "threads": torch.get_num_threads(), "gpus": gpus}


def plugins_failed() -> list[str]:
    """One line per plugin failure."""
    from posenc.plugins import plugin_records

    return [f"{record.name} ({record.distribution}): {text}" for record in plugin_records() for text in record.failures]


def backends() -> dict[str, str]:
    """Whether each backend runs a small case here: ``"runs"`` or the reason why not."""
    from posenc import plugins

    found: dict[str, str] = {}
    for name, info in plugins.backends().items():
        device = next((d for d in info.capabilities.devices if _present(d)), None)
        if device is None:
            found[name] = f"cannot run here: needs {' or '.join(info.capabilities.devices)}"
            continue
        try:
            _attention(name, device)
        except Exception as error:  # any failure of a backend is a finding, not a crash of the doctor
            found[name] = f"fails: {type(error).__name__}: {error}"
        else:
            found[name] = f"runs on {device}"
    return found


def self_test() -> dict[str, Any]:
    """Hold cpu_flash to the dense reference on one small LaMPE plan."""
    try:
        error = float((_attention("cpu_flash", "cpu") - _attention("reference", "cpu")).abs().max())
    except Exception as problem:
        return {"passed": False, "reason": f"{type(problem).__name__}: {problem}"}
    passed = error <= TOLERANCE  # False for NaN as well
    return {
        "passed": passed,
        "reason": f"largest difference between cpu_flash and reference {error:.1e} (tolerance {TOLERANCE:.0e})",
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for people, and for bug reports."""
    machine, test = report["machine"], report["self_test"]
    lines = ["posenc doctor (paste this into a bug report)", ""]
    lines += [f"{name:<13} {version}" for name, version in report["versions"].items()]
    lines += [f"{'platform':<13} {machine['platform']}, {machine['threads']} threads"]
    lines += [f"{'gpu':<13} {', '.join(machine['gpus']) or 'none'}", "", "backends"]
    lines += [f"  {name:<11} {state}" for name, state in report["backends"].items()] or ["  none"]
    lines += ["plugins"]
    lines += [f"  FAILED {failure}" for failure in report["plugins_failed"]] or ["  all loaded"]
    lines += ["", f"self-test: {'passed' if test['passed'] else 'FAILED'}, {test['reason']}"]
    return "\n".join(lines)


def _present(device: str) -> bool:
    import torch

    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())


def _attention(backend: str, device: str) -> Any:
    import torch

    from posenc.dispatch import attention
    from posenc.plugins import backends, strategy
    from posenc.rope import Rotary

    generator = torch.Generator().manual_seed(0)
    dtypes = backends()[backend].capabilities.dtypes
    dtype = torch.float32 if torch.float32 in dtypes else dtypes[0]
    q, k, v = (
        torch.randn(1, heads, 600, 64, generator=generator).to(device=device, dtype=dtype) for heads in (4, 2, 2)
    )
    plan = strategy("lampe", window=256, mapping=160).plan(600)
    with torch.no_grad():
        out = attention(q, k, v, plan, Rotary.from_theta(1e4, 64), backend=backend)
    assert isinstance(out, torch.Tensor)
    return out.float().cpu()
