"""The error of the contract suite."""

from __future__ import annotations

from typing import NoReturn


class ContractViolation(AssertionError):
    """A plugin breaks the contract or a capability that it declares itself."""


def violated(message: str) -> NoReturn:
    """Raise ContractViolation; the message must be understandable without the test."""
    raise ContractViolation(message)
