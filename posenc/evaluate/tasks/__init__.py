"""The built-in tasks of a suite, registered as a third party's would be.

A new one is a :class:`~posenc.evaluate.tasks.base.Task`, registered here or by a plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from posenc.hookspecs import hookimpl

if TYPE_CHECKING:
    from posenc.evaluate.tasks.base import Task


@hookimpl
def posenc_register_tasks(register: Callable[[type[Task]], None]) -> None:
    """Register the built-in tasks."""
    from posenc.evaluate.tasks.counting import CommonWords, FrequentWords
    from posenc.evaluate.tasks.needles import MultiKey, MultiQuery, MultiValue, SingleNeedle
    from posenc.evaluate.tasks.passkey import Passkey, SinglePasskey
    from posenc.evaluate.tasks.perplexity import SlidingPerplexity
    from posenc.evaluate.tasks.spans import SingleSpan, Spans
    from posenc.evaluate.tasks.variables import VariableTracking

    register(SlidingPerplexity)
    register(Spans)
    register(SingleSpan)
    register(Passkey)
    register(SinglePasskey)
    register(SingleNeedle)
    register(MultiKey)
    register(MultiValue)
    register(MultiQuery)
    register(VariableTracking)
    register(CommonWords)
    register(FrequentWords)
