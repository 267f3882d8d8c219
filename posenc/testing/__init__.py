"""The contract suite: what every strategy, adapter and backend must satisfy, as classes for pytest.

    import posenc.testing

    class TestMine(posenc.testing.StrategyContract):
        strategy = MyStrategy

It needs ``pip install posenc[testing]``; nothing else in posenc imports this package.
"""

from __future__ import annotations

try:
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"posenc.testing needs pytest and hypothesis, and {error.name!r} is not installed. "
        "Install both with: pip install 'posenc[testing]'"
    ) from error

from posenc.testing.adapter import AdapterContract
from posenc.testing.backend import BackendContract
from posenc.testing.definition import attention_by_definition
from posenc.testing.generators import random_plans
from posenc.testing.strategy import StrategyContract
from posenc.testing.violation import ContractViolation

__all__ = [
    "AdapterContract",
    "BackendContract",
    "ContractViolation",
    "StrategyContract",
    "attention_by_definition",
    "random_plans",
]
