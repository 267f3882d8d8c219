"""Cases small enough to run quickly, and made-up results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from posenc.bench import results
from posenc.bench.cases import BenchCase


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command line in this process."""
    from posenc.cli._group import group

    return lambda *arguments: CliRunner().invoke(group, [str(argument) for argument in arguments])


def small(kind: str, **changes: Any) -> BenchCase:
    """Return a case of 64 tokens with window 16."""
    of_model = kind in ("prefill", "decode", "padded")
    facts: dict[str, Any] = {
        "kind": kind,
        "shape": "tiny" if of_model else "4/2x16",
        "dtype": "float32",
        "threads": 1,
        "length": 64,
        "window": 16,
        "strategy": "rerope",
        "backend": "auto",
    }
    return BenchCase(**{**facts, **changes})


def row(**changes: Any) -> results.BenchRow:
    """Return a row of a result file: ratio 1.25 at 4096 tokens, where the goal is 1.15."""
    facts: dict[str, Any] = {
        "kind": "attention",
        "shape": "9/3x64",
        "dtype": "float32",
        "threads": 2,
        "length": 4096,
        "window": 1024,
        "strategy": "lampe",
        "params": {"mapping": 768},
        "backend": "auto",
        "first": (0.3, 0.4),
        "plain": (0.2, 0.2, 0.2),
        "remapped": (0.22, 0.25, 0.3),
        "memory": {"plain": 2**20, "remapped": 3 * 2**19},
    }
    return results.BenchRow(**{**facts, **changes})


def result(*rows: results.BenchRow, **machine: Any) -> results.Result:
    """Return a result file with these rows."""
    facts: dict[str, Any] = {
        "cpu": "Made-Up CPU @ 3 GHz",
        "cores": 2,
        "memory_gib": 8.0,
        "system": "Linux x86_64",
        "vector_units": "AVX2",
        "wait_policy": "PASSIVE",
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
        "load_before": 0.1,
        "load_after": 1.9,
        "other_cores": 0.02,
    }
    return results.Result(
        format="posenc-bench",
        version=1,
        command="posenc bench attention --lengths 4096",
        machine=results.Machine(**{**facts, **machine}),
        rows=rows or (row(),),
    )
