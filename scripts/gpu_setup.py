"""What every GPU script checks first: is there a device, is posenc complete, and which versions are installed.

python3 -m scripts.gpu_setup    # print versions and, per backend, why it cannot run here
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from scripts.gpu_process import Died, Workers
from scripts.gpu_site import ROOT, prepare

FOLDER = ROOT / "out" / "gpu" / "run"

SECONDS = 70.0
XFORMERS = "xformers-operators"
"""The process that lists xformers' operators."""


def no_device(device: str) -> str | None:
    """Return why nothing can be measured here, or None."""
    try:
        import torch

        from posenc.plugins import backends
    except ImportError as error:
        return f"{error}. Install posenc and its dependencies into this Python, or see 'make gpu-wheels'."
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA GPU here, or this build of torch cannot use it. Use --device cpu --smoke to try the steps."
    if not backends():
        return "posenc's own plugins were not found: install its wheel, see 'make gpu-wheels'."
    return None


def facts(workers: Workers, device: str) -> dict[str, Any] | None:
    """Return the facts of the machine from the first process that answers, or None if none does."""
    for worker in workers.values():
        with suppress(Died):
            machine: dict[str, Any] = worker.ask("scripts.gpu_times:describe", SECONDS, device=device)
            return machine
    return None


def unusable(workers: Workers, device: str) -> dict[str, str]:
    """Return the backends that cannot run here, and why; each is asked in its own process, which may crash."""
    reasons = {}
    for name, worker in workers.items():
        try:
            reason = worker.ask("scripts.gpu_times:refusal", SECONDS, backend=name, device=device)
        except Died as error:
            reason = f"it cannot be asked: {error}"
        if reason is not None:
            reasons[name] = reason
    return reasons


def operators() -> dict[str, str]:
    """Return xformers' forward operators, and why each refuses 128-channel bfloat16 heads (empty if it takes them)."""
    try:
        import torch

        from posenc.plugins import backends

        xformers: Any = backends()["xformers"].backend
        fmha = xformers.fmha
        x = torch.zeros(1, 16, 8, 128, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu")
        inputs = fmha.Inputs(query=x, key=x, value=x)
        return {op.NAME: "; ".join(op.not_supported_reasons(inputs)) for op in fmha.ALL_FW_OPS}
    except Exception as error:  # another release of xformers, or none: the error is the answer
        return {"xformers": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}


def main(arguments: list[str] | None = None) -> int:
    """Print the facts, the refusals and the operators as JSON."""
    chosen = parse(arguments)
    prepare()
    device = "cpu" if chosen.smoke else "cuda"
    reason = no_device(device)
    if reason is not None:
        print(f"gpu_setup: {reason}", file=sys.stderr)
        return 2
    from posenc.plugins import backends

    with Workers([*backends(), XFORMERS], FOLDER) as workers:
        xformers = workers.pop(XFORMERS)
        report: dict[str, Any] = {"facts": facts(workers, device), "refused": unusable(workers, device)}
        try:
            report["xformers"] = xformers.ask("scripts.gpu_setup:operators", SECONDS)
        except Died as error:
            report["xformers"] = str(error)
        xformers.end()
    text = json.dumps(report, indent=1)
    print(text)
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(text + "\n")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python3 -m scripts.gpu_setup", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="describe the CPU instead")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the JSON to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
