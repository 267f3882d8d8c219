"""Values that kernels work out once from a plan, a segment or a rotary, and keep on it.

``plan.derived(layout_of, q_len)`` returns ``layout_of(plan, q_len)``. The first call computes the value; later calls
with equal arguments, from other layers and other decoding steps, return the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar, TypeVarTuple

Value = TypeVar("Value")
Arguments = TypeVarTuple("Arguments")

MOST = 16
"""Values that one object keeps: frequencies that follow the length are new at every token, and each has its tables."""


@dataclass(frozen=True, eq=False)
class Derivable:
    """Base of immutable objects that keep what is derived from them.

    Derived values are no part of an object's meaning. A copy starts without any, whether :func:`dataclasses.replace`,
    :mod:`copy` or :mod:`pickle` makes it.
    """

    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def derived(self, make: Callable[[Self, *Arguments], Value], *arguments: *Arguments) -> Value:
        """``make(self, *arguments)``, computed once and kept.

        The value is made outside of autograd and of ``torch.inference_mode()``: see :func:`ordinary_tensors`. The
        object keeps its :data:`MOST` latest values. Threads that ask for a missing value at the same time may both
        make it.

        Parameters
        ----------
        make : callable
            A function of a module, not a lambda or a function made inside another one: together with the arguments it
            is the key, so the value of one function is never taken for that of another.
        *arguments
            Hashable; the value must depend on nothing else.

        Returns
        -------
        Value
            What ``make`` returned. It is shared, so it must not be changed.
        """
        return self._keep((make, *arguments), make, *arguments)

    def _keep(self, key: Hashable, make: Callable[[Self, *Arguments], Value], *arguments: *Arguments) -> Value:
        """The value under a key. A missing one is made, and the oldest values give way to it."""
        values = self._derived
        try:
            value: Value = values[key]
        except KeyError:
            with ordinary_tensors():
                value = make(self, *arguments)
            for old in list(values)[: max(0, len(values) + 1 - MOST)]:
                values.pop(old, None)
            values[key] = value
        return value

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_derived": {}}


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that can be kept: outside of autograd and of ``torch.inference_mode()``.

    A tensor that is created in inference mode can never take part in a backward pass, and a kept tensor outlives the
    mode of its first use.
    """
    import torch  # here, because plans need numpy only

    with torch.inference_mode(False), torch.no_grad():
        yield
