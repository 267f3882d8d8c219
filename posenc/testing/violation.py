"""The one error of the contract suite."""

from __future__ import annotations

from typing import NoReturn


class ContractViolation(AssertionError):
    """A plugin does not do what the contract, or its own declared capabilities, say."""


def violated(message: str) -> NoReturn:
    """Fail with a message that stands on its own."""
    raise ContractViolation(message)
