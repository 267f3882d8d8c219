"""Try what plugins registered: every strategy plans a few lengths, and every backend runs a small case.

Discovery only reads declarations; ``posenc plugins`` and ``posenc doctor`` also run this.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from posenc.errors import InvalidConfigError
from posenc.kernels.dispatch import attention
from posenc.planning.planner import Planner
from posenc.plugins import PluginRecord, backends, plugin_records, strategies, strategy
from posenc.registry import BackendInfo, StrategyInfo
from posenc.rope import Rotary

WINDOW = 512
TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}


def tried_records() -> list[PluginRecord]:
    """The records of all plugins, including the failures of strategies that plan wrongly."""
    reasons = {f"strategy {name}": strategy_failure(info) for name, info in strategies().items()}
    failures = {item: f"{item}: {reason}" for item, reason in reasons.items() if reason is not None}
    return [
        replace(record, failures=(*record.failures, *(failures[item] for item in record.provides if item in failures)))
        for record in plugin_records()
    ]


def strategy_failure(info: StrategyInfo) -> str | None:
    """Why a strategy's plans with default parameters are wrong; None if they are right, or if it has no defaults."""
    try:
        Planner(info.factory(window=WINDOW), layers=2).try_out()
    except InvalidConfigError:
        return None
    except Exception as error:  # whatever a plugin raises is a failure to report
        return f"{type(error).__name__}: {error}"
    return None


def backend_state(info: BackendInfo) -> tuple[str, bool | None]:
    """The state of a backend on this machine in words, and whether its output is right; None if it cannot run here."""
    device = next((device for device in info.capabilities.devices if _present(device)), None)
    if device is None:
        return f"cannot run here: needs {' or '.join(info.capabilities.devices)}", None
    dtypes = info.capabilities.dtypes
    dtype = torch.float32 if torch.float32 in dtypes else dtypes[0]
    try:
        refusal = info.backend.refuses(*small_tensors(device, dtype), None)
        if refusal is not None:
            return f"cannot run here: {refusal}", None
        out = small_attention(info.name, device, dtype)
        error = float((out - small_attention("reference", "cpu", dtype)).abs().max())
    except Exception as problem:  # any failure of a backend is reported and does not stop the command
        return f"fails on {device}: {type(problem).__name__}: {problem}", False
    right = error <= TOLERANCE[dtype]  # False for NaN as well
    name = str(dtype).removeprefix("torch.")
    verdict = "runs" if right else "WRONG"
    return f"{verdict} on {device}, {name}, off by {error:.0e} (allowed {TOLERANCE[dtype]:.0e})", right


def backend_states() -> dict[str, tuple[str, bool | None]]:
    """The state of every registered backend."""
    return {name: backend_state(info) for name, info in backends().items()}


def small_attention(backend: str, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Attention of 300 tokens under a LaMPE plan for a window of 128, as float32 on the CPU."""
    q, k, v = small_tensors(device, dtype)
    plan = strategy("lampe", window=128, mapping=80).plan(300)
    with torch.no_grad():
        out = attention(q, k, v, plan, Rotary.from_theta(1e4, 64), backend=backend)
    assert isinstance(out, Tensor)
    return out.float().cpu()


def small_tensors(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query [1, 4, 300, 64], key and value [1, 2, 300, 64] of the small case."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, 300, 64, generator=generator).to(device=device, dtype=dtype) for heads in (4, 2, 2)
    )
    return q, k, v


def _present(device: str) -> bool:
    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())
